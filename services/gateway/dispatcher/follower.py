"""One client of a resumable request. Owns: which event it gets next, wherever the request runs.

It reads the journal of a request that runs here, and the log in the store of any other one, and turns from
one to the other as gateways take over; its client does not notice. Must not know: APIs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from services.common.allowance import Allowance
from services.common.clock import Clock
from services.common.errors import (
    ArgumentInvalid,
    ClientStalled,
    InterlockError,
    RequestUnknown,
    StoreUnavailable,
    WorkerLost,
)
from services.gateway.core.events import Chunk, Event, Finished, Queued, Started
from services.gateway.core.jobs import Outcome
from services.gateway.core.log import Entry, Failed, LogPage
from services.gateway.core.log_errors import lost_log
from services.gateway.core.ports import GenerationLog
from services.gateway.core.queue_errors import ended_error, exists_with_other_body
from services.gateway.dispatcher.journal import Journal
from services.gateway.dispatcher.reader import ReaderWatch
from services.gateway.dispatcher.streams import HangUp

# A notice that was lost is made good within this.
LOOK_AGAIN_S = 1.0
# How long a follower waits for a store that is away.
PATIENCE_S = 30.0
# And for a log that was lost and may be written again, once the store has a route: workers come back to the
# controller within 2 s, whoever has the log finds its way back within 2 s more, and writes within 1 s.
LOST_LOG_WAIT_S = 10.0


class Follower:
    """The events of one resumable request behind a cursor; see `AnswerStream`.

    Attributes:
        allowance: See `AnswerStream`; None unless the request was admitted here.

    Args:
        model: The model whose queue has the job.
        job_id: The job.
        cursor: The last position that the client has seen.
        log: The logs in the store.
        clock: Measures.
        stall_s: How long the client may leave an event unread.
        on_close: Is called once, when the client is gone, was away for too long or has heard the end.
    """

    def __init__(
        self,
        model: str,
        job_id: str,
        cursor: int,
        log: GenerationLog,
        clock: Clock,
        stall_s: float,
        on_close: Callable[[Follower], None],
    ) -> None:
        self.job_id = job_id
        self.cursor = cursor
        self.allowance: Allowance | None = None
        self._model = model
        self._log = log
        self._clock = clock
        self._reader = ReaderWatch(clock, stall_s, self._stalled)
        self._on_close: Callable[[Follower], None] | None = on_close
        self._journal: Journal | None = None
        self._leave_journal: Callable[[], None] = _nothing
        self._read = cursor
        self._whole = False
        self._entries: deque[Entry] = deque()
        # The last that was read, and whether the store is to show that it has it.
        self._last: Entry | None = None
        self._doubted = False
        self._lives = False
        self._queued: Queued | None = None
        self._unsaid: Queued | None = None
        self._started: Started | None = None
        self._revision = ""
        self._error: InterlockError | None = None
        self._ended = False
        # Since when the store is away, and since when it has not the log.
        self._away_s: float | None = None
        self._lost_s: float | None = None
        self._noticed = asyncio.Event()

    @property
    def started(self) -> Started | None:
        """See `AnswerStream.started`."""
        return self._started or (self._journal.started if self._journal is not None else None)

    @property
    def error(self) -> InterlockError | None:
        """See `AnswerStream.error`."""
        return self._error

    def read_journal(self, journal: Journal, leave: Callable[[], None]) -> None:
        """Reads a request that runs here, from now on; `leave` is called once, when the client has gone."""
        self._close_journal()
        self._journal, self._leave_journal = journal, leave
        journal.readers.add(self.notice)
        # Should another gateway take over, the store must have what was read here.
        self._lives = self._doubted = True
        self._noticed.set()

    def continues_in(self, journal: Journal) -> bool:
        """Whether a journal has what was read in the store."""
        if self._read > len(journal.entries):
            return False
        return self._last is None or journal.entries[self._read - 1].event == self._last.event

    async def read_store(self, digest: str = "") -> None:
        """Reads the store once, for a request that runs elsewhere.

        Raises:
            RequestUnknown: It is not there, or was not asked to be resumable.
            RequestExists: It was asked something else than `digest` says.
            ArgumentInvalid: It has ended, and its log is shorter than the cursor.
            StoreUnavailable: The store does not answer.
        """
        page = await self._read_page()
        if page is None:
            raise RequestUnknown("No resumable request of that id is known for this subject.")
        if digest and page.digest != digest:
            raise exists_with_other_body()
        if page.outcome is not None and 0 < page.end < self._read:
            # It is whole, and never had such a position.
            raise ArgumentInvalid(f"cursor: the log has {page.end} events.")
        self._take_page(page)

    def notice(self) -> None:
        """There may be more to read."""
        self._noticed.set()

    def end(self, error: InterlockError) -> None:
        """Ends it for the client, who reads on where the end is here already; the request itself goes on."""
        if not self._ended and not self._has_end:
            self._fail(error)
        self._noticed.set()

    @property
    def _has_end(self) -> bool:
        """Whether all that the client has still to read is here."""
        if self._entries and self._entries[-1].is_last:
            return True
        return self._journal is not None and self._journal.ended and not self._journal.moved

    @property
    def prompt_tokens(self) -> int | None:
        """See `AnswerStream.prompt_tokens`; a log does not hold the prompt."""
        return None

    @property
    def has_news(self) -> bool:
        """See `AnswerStream.has_news`."""
        return bool(self._entries) or self._unsaid is not None or self._ended

    async def first_output(self, timeout_s: float) -> bool:
        """See `AnswerStream.first_output`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (output := self._first_output()) is None and not self._ended:
                    await self._fill()
        except TimeoutError:
            return True
        if isinstance(output, Failed):
            raise output.error
        if output is None and self._error is not None:
            raise self._error
        return bool(self._entries) or not self._ended

    async def ready(self, timeout_s: float) -> bool:
        """See `AnswerStream.ready`."""
        self._reader.returned()
        if self.has_news:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while not self.has_news:
                    await self._fill()
        except TimeoutError:
            self._reader.left()
            return False
        return True

    def __aiter__(self) -> Self:
        """The stream itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one."""
        self._reader.returned()
        while not self.has_news:
            await self._fill()
        event = self._next()
        if event is None:
            # Nobody's place is taken by a client that has still to read a body made of all it heard.
            self._leave()
            raise self._error or StopAsyncIteration
        self._reader.left()
        return event

    def took(self) -> None:
        """See `AnswerStream.took`."""
        self._reader.took()

    def watched(self, hang_up: HangUp) -> None:
        """See `AnswerStream.watched`."""
        self._reader.watched(hang_up)

    async def aclose(self) -> None:
        """See `AnswerStream.aclose`."""
        self._leave()

    def _stalled(self, error: ClientStalled) -> None:
        self._fail(error)
        # It may be a whole log.
        self._entries.clear()
        self._leave()

    def _leave(self) -> None:
        self._reader.close()
        on_close, self._on_close = self._on_close, None
        self._close_journal()
        if on_close is not None:
            on_close(self)

    def _close_journal(self) -> None:
        leave, self._leave_journal = self._leave_journal, _nothing
        if self._journal is not None:
            self._journal.readers.discard(self.notice)
        leave()

    def _first_output(self) -> Chunk | Finished | Failed | None:
        """The first of what was read that is text or an end."""
        events = (entry.event for entry in self._entries)
        return next((event for event in events if isinstance(event, Chunk | Finished | Failed)), None)

    def _next(self) -> Event | None:
        """The next of what was read; None: nothing follows it but, perhaps, an error."""
        if self._error is not None:
            return None
        if self._entries:
            return self._take(self._entries.popleft())
        queued, self._unsaid = self._unsaid, None
        return queued

    def _take(self, entry: Entry) -> Event | None:
        event = entry.event
        self.cursor += 1
        if isinstance(event, Failed):
            self._fail(event.error)
            return None
        if isinstance(event, Chunk) and self._started is not None:
            self._revision = self._started.revision
        if isinstance(event, Started):
            if self._revision not in {"", event.revision}:
                # The log was lost and begun anew: two texts would be mixed.
                self._fail(lost_log())
                return None
            self._started = event
        if entry.is_last:
            self._ended = True
        return event

    def _fail(self, error: InterlockError) -> None:
        self._error = error
        self._ended = True

    async def _fill(self) -> None:
        """Looks for more, or waits for a moment in which there may be some."""
        self._noticed.clear()
        journal = self._journal
        if journal is None or journal.moved:
            await self._fill_from_store()
        elif len(journal.entries) > self._read:
            self._take_entries(journal.entries[self._read :])
        elif journal.queued is not self._queued and not self._read:
            self._queued = self._unsaid = journal.queued
        elif journal.error is not None:
            self._fail(journal.error)
        elif journal.ended:
            self._ended = True
        else:
            await self._noticed.wait()

    async def _fill_from_store(self) -> None:
        now_s = self._clock.monotonic()
        try:
            page = await self._read_page()
        except StoreUnavailable as error:
            # What it has lost can be written again from when it is back.
            self._away_s, self._lost_s = now_s if self._away_s is None else self._away_s, None
            await self._bear(error, now_s - self._away_s, PATIENCE_S)
            return
        except WorkerLost as error:
            self._fail(error)
            return
        if page is None or page.end < self._read:
            # Whoever runs it may have its events still, and write them again; another one may write others.
            # What waits for a slot has none to write by: it has its time from when it is lent one.
            since_s = now_s if self._lost_s is None or (page is not None and page.waits) else self._lost_s
            self._lost_s, self._doubted = since_s, True
            await self._bear(lost_log(), now_s - self._lost_s, LOST_LOG_WAIT_S if self._lives else 0.0)
            return
        self._away_s = self._lost_s = None
        if not self._take_page(page):
            await self._await_notice()

    async def _read_page(self) -> LogPage | None:
        """The next of the log. Where nothing follows any more it is noted whether the log has an end.

        Raises:
            WorkerLost: What was read before is not what stands there now: the request was begun anew.
        """
        known = self._last if self._doubted else None
        after = self._read if known is None else self._read - 1
        was_there = self._lives or self._read > 0
        page = await self._log.read(self._model, self.job_id, after, known=was_there)
        if page is None:
            return None
        self._lives = page.outcome is None
        if page.end >= self._read:
            if known is not None and page.entries[0].event != known.event:
                raise lost_log()
            page = replace(page, entries=page.entries[self._read - after :])
            self._doubted = False
        if page.outcome is Outcome.FINISHED and page.end == self._read > 0:
            # Its gateway may not have been able to write the rest; what a client has seen may be the end.
            last = await self._log.read(self._model, self.job_id, page.end - 1)
            self._whole = last is not None and any(entry.is_last for entry in last.entries)
        return page

    def _take_page(self, page: LogPage) -> bool:
        """Takes what a page brings; returns whether that is news."""
        self._take_entries(page.entries)
        if not page.entries and page.outcome is not None:
            self._end_without_word(page, page.outcome)
        return bool(page.entries) or self._ended

    def _take_entries(self, entries: Sequence[Entry]) -> None:
        self._entries.extend(entries)
        self._read += len(entries)
        if entries:
            self._last = entries[-1]
            # A log begins with a grant: a place that was not told by then is left.
            self._unsaid = None

    def _end_without_word(self, page: LogPage, outcome: Outcome) -> None:
        """The job has ended, and nothing of the log is left to tell."""
        if page.end < self._read or (outcome is Outcome.FINISHED and not self._whole):
            self._fail(lost_log())
        elif outcome is Outcome.FINISHED:
            self._ended = True
        else:
            # Its end was reached where nobody could write.
            self._fail(ended_error(outcome))

    async def _bear(self, error: InterlockError, borne_s: float, patience_s: float) -> None:
        """Waits a moment for a trouble to pass that has lasted for so long, but not for ever."""
        if borne_s >= patience_s:
            self._fail(error)
        else:
            await self._await_notice()

    async def _await_notice(self) -> None:
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._noticed.wait()
        except TimeoutError:
            return


def _nothing() -> None:
    """Nobody is to be told."""
