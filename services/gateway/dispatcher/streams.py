"""What an API's servicer reads. Owns: the one shape of an answer under way, wherever it is generated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol, Self, TypeAlias

from services.common.allowance import Allowance
from services.common.errors import InterlockError
from services.gateway.core.events import Event, Started

# Ends the call of a client, which waits in a write, with an error.
HangUp: TypeAlias = Callable[[InterlockError], None]


class AnswerStream(Protocol):
    """The events of one request for one client. Iterate over it, and close it.

    Asking for the next event says that the last one is written. Iteration ends after `Finished`, or raises
    the InterlockError that the request ended with.
    """

    @property
    def cursor(self) -> int:
        """The position of the event that was returned last."""
        ...

    @property
    def started(self) -> Started | None:
        """The latest grant that is known; None before the first."""
        ...

    @property
    def error(self) -> InterlockError | None:
        """What the request ended with; None while it is under way and after a success."""
        ...

    @property
    def allowance(self) -> Allowance | None:
        """What was left to the tenant when the request was admitted here; None: elsewhere, or no limit."""
        ...

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None: the request runs elsewhere, and only its end tells."""
        ...

    async def first_output(self, timeout_s: float) -> bool:
        """Returns once there is text to be read, or an end, and when that takes longer.

        False: the client has seen the end before, and nothing follows.

        Raises:
            InterlockError: What the request ended with before there was any.
        """
        ...

    @property
    def has_news(self) -> bool:
        """Whether the next event is there. To look does not say that the last one is written."""
        ...

    async def ready(self, timeout_s: float) -> bool:
        """Whether, within `timeout_s`, asking for the next event will answer at once.

        Where it will not, the client is sent a sign of life, and counts as away until somebody asks again.
        """
        ...

    def took(self) -> None:
        """The client has taken a part of the last event, which is written in several."""
        ...

    def watched(self, hang_up: HangUp) -> None:
        """From now on `hang_up` is called, once, when the client has left an event unread for too long.

        What the stream held is free by then, and whoever reads on all the same is told CLIENT_STALLED.
        """
        ...

    async def aclose(self) -> None:
        """The client is gone, or has all it wanted."""
        ...

    def __aiter__(self) -> Self:
        """The stream itself."""
        ...

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one."""
        ...


async def see_off(begun: asyncio.Task[AnswerStream]) -> None:
    """Closes what a client would have got that has gone."""
    with contextlib.suppress(InterlockError):
        stream = await begun
        await stream.aclose()
