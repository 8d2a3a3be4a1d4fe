"""The queue with a fallback. Owns: which queue lends slots now, the shared one or this gateway's own.

While the shared queue answers, everything goes there. The first call that finds it gone moves every live job
into a queue in memory, over the last known workers and route, and new jobs join them there: running streams
notice nothing, new ones are marked as degraded. Each renewal may try the shared queue once; when it answers,
every job is told to it, and the queue in memory is thrown away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from pybreaker import CircuitBreakerError

from services.common import logs
from services.common.clock import Clock
from services.common.errors import InterlockError, StoreUnavailable
from services.common.redis_client import RETRY_AFTER_S
from services.gateway.adapters.breakers import store_verdict_of
from services.gateway.adapters.homecoming import Homecoming
from services.gateway.adapters.job_book import JobBook, LiveEntry, OwedEnd
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.adapters.pybreaker_circuit import Circuit
from services.gateway.adapters.standby import Standby
from services.gateway.adapters.tenant_minutes import TenantMinutes
from services.gateway.core.breaker import State, Verdict
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.log import LogTail, Notice, TakenUp
from services.gateway.core.ports import BreakerBoard, JobQueue, SharedQueue, StoreQueue
from services.gateway.core.tenancy import TenantUsage

T = TypeVar("T")


class FallbackJobQueue:
    """`JobQueue` and `BreakerBoard` over a shared queue and one of this gateway's own.

    Args:
        primary: The queue that all gateways share.
        standby: Makes the queue in memory from what was last known.
        circuit: The breaker around the primary.
        clock: Measures.
    """

    def __init__(self, primary: StoreQueue, standby: Standby, circuit: Circuit, clock: Clock) -> None:
        self._primary = primary
        self._standby = standby
        self._circuit = circuit
        self._clock = clock
        self._book = JobBook()
        self._minutes = TenantMinutes(clock)
        self._home = Homecoming(primary, self._book, self._minutes, clock)
        self._own: MemoryJobQueue | None = None
        self._returns = 0
        self._returning = asyncio.Lock()
        self._receive: Callable[[Grant], None] = _ignore
        primary.on_grant(self._granted_by_primary)

    @property
    def degraded(self) -> bool:
        """Whether slots are lent by this gateway alone."""
        return self._own is not None

    # --- JobQueue -------------------------------------------------------------------------------------------

    def on_grant(self, receive: Callable[[Grant], None]) -> None:
        """See `JobQueue.on_grant`."""
        self._receive = receive

    def on_notice(self, receive: Callable[[Notice], None]) -> None:
        """See `JobQueue.on_notice`. Other gateways speak through the shared queue alone."""
        self._primary.on_notice(receive)

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """See `JobQueue.enqueue`."""
        entry = self._book.write(job, self._clock.monotonic())
        try:
            return await self._either(job.model, lambda queue: self._enqueue(queue, entry))
        except InterlockError as error:
            if self._own is not None and not isinstance(error, StoreUnavailable):
                # The shared queue's word came when its jobs were here already.
                if entry.grant is not None:
                    return entry.grant
                await self._own.cancel(job.model, job.job_id, job.submission)
            self._book.strike(entry)
            raise

    async def renew(
        self,
        model: str,
        running: Mapping[str, str],
        waiting: frozenset[str],
        *,
        places: frozenset[str] | None = None,
        leaving: bool = False,
    ) -> Renewal:
        """See `JobQueue.renew`. Here, once a second, the way back is looked for."""
        await self._return(model)

        async def renew(queue: JobQueue) -> Renewal:
            renewal = await queue.renew(model, running, waiting, places=places, leaving=leaving)
            heard = (self._hear(queue, grant) for grant in renewal.granted)
            granted = tuple(grant for grant in heard if grant is not None)
            degraded = queue is not self._primary
            return replace(renewal, granted=granted, degraded=degraded, returns=self._returns)

        return await self._either(model, renew)

    async def settle(
        self,
        model: str,
        job_id: str,
        nonce: str,
        outcome: Outcome,
        used_tokens: int,
        tail: LogTail | None = None,
    ) -> bool:
        """See `JobQueue.settle`."""
        entry = self._book.strike_ended(job_id, nonce)
        settled = await self._either(
            model, lambda queue: queue.settle(model, job_id, nonce, outcome, used_tokens, tail)
        )
        if entry is not None:
            self._home.note_end(entry, outcome, used_tokens, tail, heard=not self.degraded)
        return settled

    async def requeue(
        self, model: str, job_id: str, nonce: str, *, pin: str = "", used_tokens: int = 0
    ) -> bool:
        """See `JobQueue.requeue`."""
        entry = self._give_back(job_id, nonce, pin, used_tokens)
        given_back = await self._either(
            model, lambda queue: queue.requeue(model, job_id, nonce, pin=pin, used_tokens=used_tokens)
        )
        self._note_given_back(entry, nonce)
        return given_back

    async def refused(self, model: str, job_id: str, nonce: str, *, hold_s: float) -> bool:
        """See `JobQueue.refused`."""
        entry = self._give_back(job_id, nonce)
        given_back = await self._either(
            model, lambda queue: queue.refused(model, job_id, nonce, hold_s=hold_s)
        )
        self._note_given_back(entry, nonce)
        return given_back

    async def register(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """See `JobQueue.register`."""
        entry = self._book.write(job, self._clock.monotonic())
        entry.grant = grant

        async def register(queue: JobQueue) -> bool:
            # A slot that the store lent while this one was lent here was never used.
            unused = queue is self._primary and bool(entry.at_store) and entry.at_store != grant.nonce
            job_there = self._known_as(queue, entry)
            return await queue.register(job_there, grant, instead=instead or unused)

        current = await self._either(job.model, register)
        if not current:
            # Somebody else's now: nothing further is heard of it.
            self._book.strike(entry)
        return current

    async def cancel(
        self,
        model: str,
        job_id: str,
        submission: str,
        tail: LogTail | None = None,
        *,
        used_tokens: int = 0,
        outcome: Outcome = Outcome.CANCELLED,
    ) -> None:
        """See `JobQueue.cancel`."""
        entry = self._book.find(job_id)
        if entry is not None:
            self._book.strike(entry)

        async def cancel(queue: JobQueue) -> None:
            name = submission if entry is None else self._known_as(queue, entry).submission
            await queue.cancel(model, job_id, name, tail, used_tokens=used_tokens, outcome=outcome)

        await self._either(model, cancel)
        if entry is not None:
            self._home.note_end(entry, outcome, used_tokens, tail, heard=not self.degraded)
        elif self.degraded:
            self._home.owe(OwedEnd(model, job_id, (), submission, outcome, used_tokens, tail))

    async def stop(self, model: str, job_id: str) -> bool:
        """See `JobQueue.stop`."""
        return await self._either(model, lambda queue: queue.stop(model, job_id))

    async def take_up(self, model: str, job_id: str) -> TakenUp | None:
        """See `JobQueue.take_up`. Should the store go away later, `register` enters the job here."""
        return await self._either(model, lambda queue: queue.take_up(model, job_id))

    async def release(self, model: str, job_id: str, submission: str) -> bool:
        """See `JobQueue.release`."""
        entry = self._book.find(job_id)
        if entry is not None:
            submission = entry.stored_job.submission
        released = await self._either(model, lambda queue: queue.release(model, job_id, submission))
        if released and entry is not None:
            self._book.strike(entry)
        return released

    async def usage(self, model: str, tenant: str) -> TenantUsage:
        """See `UsageBook.usage`."""
        return await self._either(model, lambda queue: queue.usage(model, tenant))

    async def reap(self, model: str) -> tuple[str, ...]:
        """See `JobQueue.reap`."""
        return await self._either(model, lambda queue: queue.reap(model))

    async def length(self, model: str) -> int:
        """See `JobQueue.length`."""
        return await self._either(model, lambda queue: queue.length(model))

    # --- BreakerBoard ---------------------------------------------------------------------------------------

    async def list_open(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """See `BreakerBoard.list_open`."""
        await self._post(lambda board: board.list_open(model, worker_id, sleep_s))

    async def list_closed(self, model: str, worker_id: str) -> None:
        """See `BreakerBoard.list_closed`."""
        await self._post(lambda board: board.list_closed(model, worker_id))

    async def _post(self, tell: Callable[[BreakerBoard], Awaitable[None]]) -> None:
        """Tells the queue that lends now; the shared one is told, too, once it is back."""
        if self._own is not None:
            await tell(self._own)
            raise StoreUnavailable("The board is told when it is back.")
        await tell(self._primary)

    # --- which queue ----------------------------------------------------------------------------------------

    async def _either(self, model: str, ask: Callable[[SharedQueue], Awaitable[T]]) -> T:
        """Asks the queue that lends slots now; the own one also where the shared one fails just then.

        Raises:
            StoreUnavailable: The shared queue is gone, and nothing is known to lend without it.
        """
        own = self._own
        if own is None:
            try:
                return await self._guarded(lambda: ask(self._primary))
            except StoreUnavailable:
                own = self._own
                if own is None or not self._standby.serves(model):
                    raise
        elif not self._standby.serves(model):
            raise StoreUnavailable(
                "The queue's store does not answer. Try again in a moment.", retry_after_s=RETRY_AFTER_S
            )
        self._standby.follow(own, model)
        return await ask(own)

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes one call to the shared queue under its breaker."""
        try:
            return await self._circuit.acall(call, store_verdict_of)
        except CircuitBreakerError as error:
            await self._retreat()
            raise StoreUnavailable(
                "The queue's store is not asked now.", retry_after_s=RETRY_AFTER_S
            ) from error
        finally:
            if self._circuit.breaker.state in {State.OPEN, State.FORCED_OPEN}:
                await self._retreat()

    def _known_as(self, queue: JobQueue, entry: LiveEntry) -> QueuedJob:
        return entry.stored_job if queue is self._primary else entry.job

    async def _enqueue(self, queue: JobQueue, entry: LiveEntry) -> Grant | Waiting:
        from_store = queue is self._primary
        # Whatever becomes of the call, the store may know the job from now on.
        entry.told = entry.told or from_store
        enqueuing = queue.enqueue(self._known_as(queue, entry))
        answer = await (self._minutes.hearing(entry.job, enqueuing) if from_store else enqueuing)
        if from_store and isinstance(answer, Grant):
            entry.at_store = answer.nonce
        elif from_store and entry.grant is None:
            entry.at_store = ""
        if not isinstance(answer, Grant):
            return answer
        if from_store and self._own is not None:
            if entry.grant is not None:
                # It went meanwhile, and the job was lent a slot here: it is told so on the way back.
                return entry.grant
            self._own.hold(entry.job, answer)
        return self._note(answer)

    def _hear(self, queue: JobQueue, grant: Grant) -> Grant | None:
        """Enters a grant that a renewal found, unless it is the store's and came too late."""
        if queue is self._primary and self.degraded:
            self._granted_by_primary(grant)
            return None
        return self._note(grant)

    def _note(self, grant: Grant) -> Grant:
        """Enters a grant of the queue that lends now; returns it as the client is told of it."""
        entry = self._book.find(grant.job_id)
        if entry is not None and entry.grant is not None and entry.grant.nonce == grant.nonce:
            return entry.grant
        told = grant if grant.degraded is self.degraded else replace(grant, degraded=self.degraded)
        if entry is not None:
            entry.note_grant(told, by_store=not self.degraded)
        return told

    def _give_back(self, job_id: str, nonce: str, pin: str = "", used_tokens: int = 0) -> LiveEntry | None:
        """Notes that a job waits again; returns it, or None where `nonce` is not the grant that counts."""
        entry = self._book.running(job_id, nonce)
        if entry is not None:
            entry.note_return(nonce, pin, used_tokens, by_store=not self.degraded)
        return entry

    def _note_given_back(self, entry: LiveEntry | None, nonce: str) -> None:
        """Notes that the store knows it, too, unless that has lent another slot to the job at once."""
        if entry is not None and not self.degraded and entry.at_store == nonce:
            entry.at_store = ""

    def _granted_by_primary(self, grant: Grant) -> None:
        if not self.degraded:
            self._receive(self._note(grant))
        elif (entry := self._book.find(grant.job_id)) is not None:
            self._granted_at_home(entry, grant)

    # --- there and back -------------------------------------------------------------------------------------

    async def _retreat(self) -> None:
        """Moves every live job into a queue of this gateway's own. Nothing is awaited on the way."""
        if self.degraded:
            return
        logs.get_logger().warning("queue.retreated", jobs=sum(1 for _ in self._book))
        self._own = own = self._standby.make_queue()
        own.on_grant(lambda grant: self._receive(self._note(grant)))
        now_s, waiting = self._clock.monotonic(), []
        # Running ones first, so that their slots are not lent again.
        for entry in self._book:
            if entry.grant is not None:
                await own.register(entry.aged(now_s), entry.grant)
            elif self._standby.serves(entry.job.model):
                waiting.append(entry.aged(now_s))
        # At once, not one by one: the loop stands still meanwhile.
        own.adopt(waiting)
        self._minutes.carry(own)

    async def _return(self, model: str) -> None:
        """Looks, when the breaker's sleep is over, whether the shared queue answers, and goes back to it."""
        if not self.degraded or self._returning.locked():
            return
        async with self._returning:
            permit = self._circuit.admit()
            if permit is None:
                return
            try:
                await self._bring_all_home(model)
            except StoreUnavailable:
                self._circuit.settle(permit, Verdict.FAILURE)
                return
            except BaseException:
                self._circuit.settle(permit, Verdict.NEUTRAL)
                raise
            # No await from here on: what happens next happens at the shared queue.
            self._circuit.settle(permit, Verdict.SUCCESS)
            if self._circuit.breaker.state in {State.CLOSED, State.FORCED_CLOSED}:
                if self._own is not None:
                    self._own.close()
                self._own = None
                self._returns += 1
                logs.get_logger().warning("queue.returned", jobs=sum(1 for _ in self._book))

    async def _bring_all_home(self, model: str) -> None:
        # This writes the clock, too: a store that may only be read is not back.
        await self._primary.length(model)
        await self._home.bring_all(self._granted_at_home)

    def _granted_at_home(self, entry: LiveEntry, grant: Grant) -> None:
        """The shared queue lent a slot to a job while the own one lends, too.

        On the way back it is taken: the store answers, and the own queue must not lend another one. In all
        other cases, as where the job runs or its text is another revision's, the store is told otherwise.
        """
        entry.at_store = grant.nonce
        is_wanted = entry.wants(grant) and self._book.lives(entry)
        if self._own is not None and self._returning.locked() and is_wanted:
            entry.grant = grant
            self._own.hold(entry.job, grant)
            self._receive(grant)


def _ignore(grant: Grant) -> None:
    """Stands in until a receiver is set; the next renewal tells of the grant again."""
