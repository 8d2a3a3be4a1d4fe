"""The way back. Owns: what a store is told that may know nothing, something old or the truth.

The store may have been emptied, have slept, or have executed a call whose answer was lost. What runs here is
the truth, and takes the place of what its submission has there. Where the store remembers an end of that, the
job is entered under another submission nonce. A resumable job that another gateway took over, or that has
ended for its subject, stays as the store has it: the next renewal tells.

While a call is under way jobs may start, come back and end here. What has started or come back differs from
what the store was told, and is told in the next round; so is an end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from services.common.clock import Clock
from services.common.errors import InterlockError, StoreUnavailable
from services.gateway.adapters.job_book import JobBook, LiveEntry, OwedEnd
from services.gateway.adapters.tenant_minutes import MINUTE_S, TenantMinutes
from services.gateway.core.jobs import Grant, Outcome, Waiting
from services.gateway.core.log import LogTail
from services.gateway.core.ports import StoreQueue

# Ends that the store has not heard of; beyond it the oldest are left to the leases, which end them too.
OWED_MAX = 4_096
# How many of them bring what their logs lack, each as much as one log may hold; others end without.
TAILS_MAX = 256
# Jobs come and go while others are brought home; what is left after so many rounds is found by renewals.
ROUNDS_MAX = 4


class Homecoming:
    """Tells the store all that it has missed.

    Args:
        store: The queue that all gateways share.
        book: The live jobs.
        minutes: What tenants used without it.
        clock: Measures.
    """

    def __init__(self, store: StoreQueue, book: JobBook, minutes: TenantMinutes, clock: Clock) -> None:
        self._store = store
        self._book = book
        self._minutes = minutes
        self._clock = clock
        self._owed: deque[OwedEnd] = deque(maxlen=OWED_MAX)

    def note_end(
        self, entry: LiveEntry, outcome: Outcome, used_tokens: int, tail: LogTail | None, *, heard: bool
    ) -> None:
        """Notes how a job has ended, unless the store has just heard of it, for when that is back.

        Of a job that it knows nothing of it is told what the tenant used.
        """
        job = entry.job.having_used(used_tokens)
        if heard:
            self._minutes.settle(job)
        elif entry.told:
            self.owe(entry.end(outcome, used_tokens, tail))
        else:
            self._minutes.use(job)

    def owe(self, end: OwedEnd) -> None:
        """Keeps an end that the store has not heard of."""
        end = replace(end, ended_s=self._clock.monotonic())
        if end.tail is not None and sum(one.tail is not None for one in self._owed) >= TAILS_MAX:
            end = replace(end, tail=None)
        self._owed.append(end)

    async def bring_all(self, granted: Callable[[LiveEntry, Grant], None]) -> None:
        """Tells every end and every live job; `granted` hears what slots the store lent to those that wait.

        When it returns, no end is left, and nothing has happened since that was looked at.

        Raises:
            StoreUnavailable: It is gone again.
        """
        for _ in range(ROUNDS_MAX):
            await self._tell_ends()
            abroad = [entry for entry in self._book if not entry.at_home]
            if not abroad:
                return
            for entry in abroad:
                if self._book.lives(entry):
                    await self._bring(entry, granted)
        await self._tell_ends()

    async def _tell_ends(self) -> None:
        while self._owed or await self._minutes.tell_one(self._store):
            if not self._owed:
                continue
            owed = self._owed[0]
            await self._tell_end(owed)
            # At the bound, an end that came meanwhile has pushed it out.
            if self._owed[0] is owed:
                self._owed.popleft()

    async def _tell_end(self, owed: OwedEnd) -> None:
        """Where the store knows no such job, its tenant is charged."""
        for nonce in owed.nonces:
            if await self._store.settle(
                owed.model, owed.job_id, nonce, owed.outcome, owed.used_tokens, owed.tail
            ):
                return
        await self._store.cancel(
            owed.model,
            owed.job_id,
            owed.submission,
            owed.tail,
            used_tokens=owed.used_tokens,
            outcome=owed.outcome,
        )
        if owed.tenant and owed.used_tokens and self._clock.monotonic() - owed.ended_s < MINUTE_S:
            # The call that told the store of the job may not have reached it.
            await self._store.book(
                owed.model, owed.tenant, owed.submission, owed.used_tokens, unless=owed.job_id
            )

    async def _bring(self, entry: LiveEntry, granted: Callable[[LiveEntry, Grant], None]) -> None:
        """Tells the store one job as it is now."""
        entry.told = True
        if entry.grant is not None:
            await self._bring_running(entry, entry.grant)
        elif (grant := await self._bring_waiting(entry)) is not None:
            granted(entry, grant)

    async def _bring_running(self, entry: LiveEntry, grant: Grant) -> None:
        now_s = self._clock.monotonic()
        if not await self._store.register(entry.stored_aged(now_s), grant, instead=True):
            if not self._book.lives(entry):
                return
            entry.rename()
            # Where this fails, too, the id is somebody else's: the next renewal ends the request.
            await self._store.register(entry.stored_aged(now_s), grant)
        entry.at_store = grant.nonce

    async def _bring_waiting(self, entry: LiveEntry) -> Grant | None:
        """Returns the slot that the store lent to the job at once."""
        if (known := entry.at_store) and await self._requeue(entry, known):
            _note_waiting(entry, known)
            return None
        if not self._book.lives(entry):
            return None
        answer = await self._enqueue(entry)
        if answer is None and self._book.lives(entry):
            # It ended there, by another gateway's hand: it lives here.
            entry.rename()
            # Where this fails, too, the id is somebody else's: the next renewal ends the request.
            answer = await self._enqueue(entry)
        if isinstance(answer, Grant):
            return answer
        _note_waiting(entry, known)
        return None

    async def _requeue(self, entry: LiveEntry, nonce: str) -> bool:
        """Ends the attempt that runs there; returns whether there is one."""
        job = entry.job
        return await self._store.requeue(
            job.model, job.job_id, nonce, pin=job.pin, used_tokens=job.used_tokens
        )

    async def _enqueue(self, entry: LiveEntry) -> Grant | Waiting | None:
        """Enters a job that waits; None where another record stands in its way."""
        try:
            return await self._store.enqueue(entry.stored_aged(self._clock.monotonic()))
        except StoreUnavailable:
            raise
        except InterlockError:
            return None


def _note_waiting(entry: LiveEntry, before: str | None) -> None:
    """Notes that the job waits at the store, unless that has lent it a slot since."""
    if entry.at_store == before:
        entry.at_store = ""
