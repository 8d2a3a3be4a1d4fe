"""The client of a request that cannot be resumed. Owns: its reading, which is what the request lives by.

A client that is gone ends its request, and one that reads slowly slows it down.
"""

from __future__ import annotations

import asyncio
from typing import Self

from services.common.allowance import Allowance
from services.common.clock import Clock
from services.common.errors import InterlockError, RequestCancelled
from services.gateway.core.events import Event, Started
from services.gateway.dispatcher.generation import Generation
from services.gateway.dispatcher.outbox import Outbox
from services.gateway.dispatcher.reader import ReaderWatch
from services.gateway.dispatcher.streams import HangUp


class DirectStream:
    """The events of one request as they come; see `AnswerStream`.

    Args:
        generation: The request.
        outbox: Where its events are.
        clock: Measures.
        stall_s: How long the client may leave an event unread.
    """

    def __init__(self, generation: Generation, outbox: Outbox, clock: Clock, stall_s: float) -> None:
        self.cursor = 0
        self._generation = generation
        self._outbox = outbox
        # One that has ended already is none the worse for it.
        self._reader = ReaderWatch(clock, stall_s, generation.withdraw)

    @property
    def started(self) -> Started | None:
        """See `AnswerStream.started`."""
        return self._generation.started

    @property
    def error(self) -> InterlockError | None:
        """See `AnswerStream.error`."""
        return self._generation.error

    @property
    def allowance(self) -> Allowance | None:
        """See `AnswerStream.allowance`."""
        return self._generation.allowance

    @property
    def prompt_tokens(self) -> int | None:
        """See `AnswerStream.prompt_tokens`."""
        return len(self._generation.job.prompt_ids)

    @property
    def has_news(self) -> bool:
        """See `AnswerStream.has_news`."""
        return self._may_read()

    async def first_output(self, timeout_s: float) -> bool:
        """See `AnswerStream.first_output`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._outbox.has_output and not self._generation.ended:
                    await self._outbox.wait()
        except TimeoutError:
            return True
        if self.error is not None and not self._outbox.has_output:
            raise self.error
        return True

    async def ready(self, timeout_s: float) -> bool:
        """See `AnswerStream.ready`."""
        self._return()
        if self._may_read():
            return True
        late = False

        def give_up() -> None:
            nonlocal late
            late = True
            self._outbox.wake()

        # Once an event, where `asyncio.timeout` would take as long as writing it as JSON.
        timer = asyncio.get_running_loop().call_later(timeout_s, give_up)
        try:
            while not self._may_read() and not late:
                await self._outbox.wait()
        finally:
            timer.cancel()
        if not self._may_read():
            self._reader.left()
        return self._may_read()

    def __aiter__(self) -> Self:
        """The stream itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one."""
        self._return()
        if self._reader.stalled is not None:
            raise self._reader.stalled
        while not self._outbox:
            if self._generation.ended:
                self._reader.close()
                raise self.error or StopAsyncIteration
            await self._outbox.wait()
        self._reader.left()
        self.cursor += 1
        return self._outbox.take()

    def took(self) -> None:
        """See `AnswerStream.took`."""
        self._reader.took()

    def watched(self, hang_up: HangUp) -> None:
        """See `AnswerStream.watched`."""
        self._reader.watched(hang_up)

    async def aclose(self) -> None:
        """Ends the request when the client is gone."""
        self._reader.close()
        if not self._generation.ended:
            self._generation.withdraw(RequestCancelled("The client ended the call."))

    def _may_read(self) -> bool:
        return bool(self._outbox) or self._generation.ended

    def _return(self) -> None:
        self._reader.returned()
        for sequence, credit in self._outbox.acknowledge():
            self._generation.add_credit(sequence, credit)
