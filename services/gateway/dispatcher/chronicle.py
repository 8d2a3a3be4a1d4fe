"""The writer of a log. Owns: how the events of one resumable request get into the log, and from there out.

It is the reader of the request's outbox: one append is under way at a time, and all that comes meanwhile goes
into the next one. Only what is written reaches a client, and only what is written renews the worker's credit.
While the store is away it is the other way round: what comes is told at once, and written when a renewal has
found that the store knows the slot.
Must not know: clients, or how the queue names slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from services.common import logs
from services.common.clock import Clock
from services.common.errors import InterlockError, StoreUnavailable
from services.gateway.core.events import Chunk, Event, Queued
from services.gateway.core.jobs import Grant
from services.gateway.core.log import AppendOutcome, Entry, Failed, LogTail, log_bounds
from services.gateway.core.log_errors import lost_log
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import GenerationLog
from services.gateway.dispatcher.journal import Journal
from services.gateway.dispatcher.outbox import Outbox

# After the store lost a log it is written again in calls of this size.
EVENTS_AT_ONCE_MAX = 256
# What is not answered is tried again: soon after a short trouble events go on, and the tries are no load.
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0
# Clients wait for so long before they are told what the store has not. A call may take longer: one that was
# not answered is enough. What refuses at once may be a restart that is over before a client notices.
SILENCE_MAX_S = 0.7
# A call has given up by then. What took longer was cut short as this process woke from standing still: it
# says nothing of the store, and another gateway may have the request by now. No shorter stop ends a lease.
STOOD_STILL_S = 3.0


class ChronicleText(Protocol):
    """What has been generated so far."""

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in a cache."""
        ...

    def charged_tokens(self) -> int:
        """What is charged however the job ends."""
        ...


class Author(Protocol):
    """Whose events are written."""

    def add_credit(self, sequence: int, tokens: int) -> None:
        """Lets the worker send so many tokens more of a sequence."""
        ...

    async def dispute(self, grant: Grant) -> None:
        """The log was refused to `grant`: find out whether it holds, and give up the request if not."""
        ...

    def overflow(self) -> None:
        """The log is at its bound."""
        ...


class Chronicle:
    """Writes one request's log.

    Args:
        job: The request.
        outbox: Where its events come from.
        log: Where they go.
        author: The request itself.
        text: Tells what the log and its store must know of the text besides.
        clock: Measures.
    """

    def __init__(
        self,
        job: GenerationJob,
        outbox: Outbox,
        log: GenerationLog,
        author: Author,
        text: ChronicleText,
        clock: Clock,
    ) -> None:
        self.journal = Journal(job.digest)
        self._job = job
        self._outbox = outbox
        self._log = log
        self._author = author
        self._text = text
        self._clock = clock
        self._accepted_s = clock.monotonic() - job.waited_s
        self._bounds = log_bounds(job.params.n * job.params.max_tokens, job.params.logprobs)
        self._said: list[Entry] = []
        self._written = 0
        self._grant: Grant | None = None
        self._last: Failed | None = None
        self._closing = False
        self._sealed = False
        self._pause_s = RETRY_FIRST_S
        # Whether the store may have lost what was written.
        self._doubted = False
        self._disputed: Grant | None = None
        self._silent_since_s: float | None = None
        self._taken_up = False
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"chronicle-{job.request_id}")

    def restore(self, entries: Sequence[Entry]) -> None:
        """Goes on behind what another gateway wrote."""
        self._taken_up = True
        self._said.extend(entries)
        self._written = len(entries)
        self.journal.extend(entries)

    def grant(self, grant: Grant) -> None:
        """The request has a slot, in whose name it is written."""
        self._grant, self._silent_since_s = grant, None
        self._outbox.wake()

    def confirm(self) -> None:
        """The store knows the slot, also one lent or told of without it: the log is written from now on."""
        if self._grant is not None and self._grant.degraded:
            self.grant(replace(self._grant, degraded=False))

    def doubt(self) -> None:
        """The store may have lost the log: it is asked how far that goes, also where all is written."""
        self._doubted = True
        self._outbox.wake()

    def pause(self) -> None:
        """The slot is given back: what was said waits for the next one."""
        self._grant = None

    def close(self, error: InterlockError | None) -> None:
        """The request has ended; what is left is written, with the slot's return at the latest."""
        self._closing = True
        if error is not None:
            self._last = Failed(error)
        self._outbox.wake()

    def tail(self, *, whole: bool = False) -> LogTail:
        """What was not written yet, or is on its way; `whole`: all, for a store that lost what was."""
        self._collect()
        position = 0 if whole else self._written
        return LogTail(position, tuple(self._said[position:]))

    def settled(self) -> None:
        """The slot was given back, and the tail is written with it."""
        self._note_written(len(self._said))
        self._seal()

    @property
    def written(self) -> int:
        """How many events the log has."""
        return self._written

    @property
    def said(self) -> int:
        """How many events the log may have: the store takes some without a word, and is told them again."""
        return len(self._said)

    @property
    def is_taken_up(self) -> bool:
        """Whether another gateway began the log, which may have told more than it could write."""
        return self._taken_up

    @property
    def is_torn(self) -> bool:
        """Whether more was told than the log has.

        What another gateway writes behind it may be other words, or the same ones in other pieces: a position
        that clients know from here says nothing there.
        """
        return len(self.journal.entries) > self._written

    def abandon(self) -> None:
        """Another gateway writes the log now."""
        if self.is_torn:
            self.journal.fail(lost_log())
        else:
            self.journal.move()
        self._seal()

    def finish(self, error: InterlockError) -> None:
        """Ends for those who still read, where nothing else could: the store did not come back."""
        self.journal.fail(error)
        self._seal()

    def _seal(self) -> None:
        self._sealed = True
        self._outbox.wake()

    async def _run(self) -> None:
        while not self._sealed:
            self._collect()
            grant = self._grant
            if grant is not None and grant.degraded and len(self.journal.entries) < len(self._said):
                # A text that stands still is worse than one that, for a while, cannot be resumed.
                self._tell(len(self._said))
            elif grant is None or grant.degraded or self._is_done:
                await self._outbox.wait()
            else:
                await self._guarded(grant)

    @property
    def _is_done(self) -> bool:
        """Whether the store has all that was said, as far as is known."""
        return self._written == len(self._said) and not self._doubted

    async def _guarded(self, grant: Grant) -> None:
        began_s = self._clock.monotonic()
        try:
            is_known = await self._append(grant)
        except StoreUnavailable:
            is_known = False
        except Exception:  # noqa: BLE001 - logged; a defect must not leave the request's clients without an end
            logs.get_logger().error("chronicle.crashed", request_id=self._job.request_id, exc_info=True)
            await asyncio.sleep(RETRY_LAST_S)
            return
        if not is_known and self._is_away(began_s):
            self._outrun(grant)
        elif not is_known:
            await self._rest()

    def _is_away(self, began_s: float) -> bool:
        """Whether the store has been of no use for too long, at last to a call that began at `began_s`."""
        now_s = self._clock.monotonic()
        if now_s - began_s >= STOOD_STILL_S:
            self._silent_since_s = None
            return False
        self._silent_since_s = began_s if self._silent_since_s is None else self._silent_since_s
        return now_s - self._silent_since_s >= SILENCE_MAX_S

    def _outrun(self, grant: Grant) -> None:
        """Tells what the log has not, until the store confirms the slot: clients do not wait for it."""
        if self._grant is grant:
            logs.get_logger().warning("log.outrun", request_id=self._job.request_id, events=self._written)
            self.grant(replace(grant, degraded=True))

    async def _rest(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, RETRY_LAST_S)

    async def _append(self, grant: Grant) -> bool:
        """Writes what comes next; returns whether the store knows the job, or has just been told of it."""
        position = self._written
        entries = self._said[position : position + EVENTS_AT_ONCE_MAX]
        job, used_tokens = self._job, self._text.charged_tokens()
        answer = await self._log.append(
            job.model, job.job_id, grant.nonce, position, entries, self._bounds, used_tokens=used_tokens
        )
        match answer.outcome:
            case AppendOutcome.WRITTEN:
                self._note_known()
                self._note_written(answer.end)
            case AppendOutcome.GAP:
                # The store was emptied and this gateway has registered the job again: all is here still.
                self._note_known()
                self._written = answer.end
            case AppendOutcome.FULL:
                self.pause()
                self._author.overflow()
            case AppendOutcome.STALE:
                self._silent_since_s = None
                if await self._judge(grant):
                    await self._rest()
            case AppendOutcome.LOST:
                return not await self._judge(grant)
        return True

    def _note_known(self) -> None:
        """The store knows the slot: its next trouble is a new one."""
        self._pause_s = RETRY_FIRST_S
        self._disputed = self._silent_since_s = None
        self._doubted = False

    async def _judge(self, grant: Grant) -> bool:
        """Was the slot returned meanwhile, is the job another gateway's, or is the store to be told of it?

        Returns whether the queue has confirmed the slot before, to no effect: it is the gateway's own, and a
        store that came back empty has not been told yet.
        """
        if self._sealed or self._grant is not grant:
            return False
        if self._closing:
            # The call that gives the slot back finds out, and carries the tail.
            self.pause()
            return False
        await self._author.dispute(grant)
        is_again, self._disputed = self._disputed is grant, grant
        return is_again

    def _note_written(self, end: int) -> None:
        self._written = max(self._written, end)
        self._tell(self._written)

    def _tell(self, end: int) -> None:
        """Lets the clients here read the log so far, and the worker go on."""
        self.journal.extend(self._said[len(self.journal.entries) : end])
        for sequence, credit in self._outbox.acknowledge():
            self._author.add_credit(sequence, credit)

    def _collect(self) -> None:
        """Takes what the outbox has."""
        while self._outbox:
            self._say(self._outbox.take())
        if self._last is not None:
            self._said.append(Entry(self._last, self._at_s()))
            self._last = None

    def _say(self, event: Event) -> None:
        if isinstance(event, Queued):
            self.journal.place(event)
            return
        is_first = isinstance(event, Chunk) and event.index == event.sequence == 0
        cached = self._text.cached_prompt_tokens if is_first else 0
        self._said.append(Entry(event, self._at_s(), cached))

    def _at_s(self) -> float:
        return self._clock.monotonic() - self._accepted_s
