"""Work that ends with the lead. Owns: the look at the lease before a change, and the end of what runs.

The end of the lead is told twice: this process notices it and closes, or the look finds it, where the process
stood still and did not notice. Must not know: what the work is, or where the lease lies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from services.common.errors import NotLeader

T = TypeVar("T")

StillLeading = Callable[[], Awaitable[None]]
"""Asks whether we lead; raises NotLeader when we do not, StoreUnavailable when nobody can say."""

# The next leader answers within seconds.
RETRY_S = 1.0


async def nobody_else_leads() -> None:
    """A `StillLeading` for who has the directory for himself."""


class WhileLeading:
    """One time of leading, as those see it who change what the next leader reads.

    Args:
        still_leading: Asks whether we lead.
    """

    def __init__(self, still_leading: StillLeading) -> None:
        self._still_leading = still_leading
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """Ends what runs, and refuses what comes; a thread ends by itself. Does not wait."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def check(self) -> None:
        """Looks without asking anybody.

        Raises:
            NotLeader: The time is over.
        """
        if self._closed:
            raise _over()

    async def confirm(self) -> None:
        """Asks; to be awaited right before a change, for afterwards the lease holds for some seconds.

        Raises:
            NotLeader: The time is over.
            StoreUnavailable: Nobody can say.
        """
        self.check()
        await self._still_leading()
        self.check()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, which is cancelled when the time is over.

        Raises:
            NotLeader: It was, or is.
        """
        if self._closed:
            # What comes late would run on, for nobody ends it any more.
            work.close()
            raise _over()
        task = asyncio.create_task(work)
        self._tasks.add(task)
        try:
            return await task
        except NotLeader as error:
            raise _begun(error) from None
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and current is not None and not current.cancelling():
                raise _begun(_over()) from None
            raise
        finally:
            self._tasks.discard(task)


def _over() -> NotLeader:
    return NotLeader("This controller does not lead any more; ask again, and go on.", retry_after_s=RETRY_S)


def _begun(error: NotLeader) -> NotLeader:
    """The same of a call that has begun: a proxy cannot give it to another controller as it was sent."""
    error.unstarted = False
    return error
