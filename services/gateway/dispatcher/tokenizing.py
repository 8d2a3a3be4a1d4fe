"""Long prompts become ids. Owns: how many at once, whose turn it is, and that a deadline holds meanwhile.

Must not know: tokenizers. A thread cannot be stopped: who is cancelled, or past their deadline, hears so at
once, and their turn is taken until their thread has ended.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from services.common.errors import DeadlineExceeded
from services.common.threads import begin_in_thread
from services.gateway.core.queue_errors import prompts_unread, tenant_unread
from services.gateway.core.turns import Turns
from services.gateway.dispatcher.room import Room

T = TypeVar("T")

# Tokenizing a prompt of 1 MiB takes about a second of one core: more at once would starve the event loop.
AT_ONCE = 4
# One turn is left to the other tenants, who then need not wait for the first of four megabytes.
OF_TENANT = AT_ONCE - 1
# Whoever sends most leaves half of the places to the others.
SHARE_MAX = 0.5
# Bytes of those that wait: a few dozen of the longest prompts.
WAITING_BYTES_MAX = 1 << 26


class Tokenizing:
    """Lets prompts be read in threads, a few at a time, in turns that go round the tenants.

    Args:
        room: The process's own, in which those that wait here are counted.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._turns: Turns[asyncio.Future[None]] = Turns(AT_ONCE, OF_TENANT)
        room.add_place(lambda: self._turns.waiting)
        # By tenant; those that wait for nothing are not in it.
        self._bytes: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Prompts that wait for their turn."""
        return self._turns.waiting

    async def read(self, tenant: str, size_bytes: int, left_s: float, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread, which reads a prompt of so many bytes.

        Raises:
            QueueFull: As many prompts wait already as may, of all tenants or of this one.
            DeadlineExceeded: It took longer than `left_s`, the wait for a turn included.
        """
        if left_s <= 0:
            raise too_late()
        try:
            async with asyncio.timeout(left_s):
                await self._take(tenant, size_bytes)
                return await begin_in_thread(work, partial(self._give_back, tenant))
        except TimeoutError:
            raise too_late() from None

    async def _take(self, tenant: str, size_bytes: int) -> None:
        if self._turns.take(tenant):
            return
        self._check_room(tenant, size_bytes)
        waiter = asyncio.get_running_loop().create_future()
        self._turns.wait(tenant, waiter)
        self._bytes[tenant] += size_bytes
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._turns.leave(tenant, waiter)
            else:
                # It came at this very moment.
                self._give_back(tenant)
            raise
        finally:
            self._bytes[tenant] -= size_bytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]

    def _give_back(self, tenant: str) -> None:
        following = self._turns.give_back(tenant)
        while following is not None and following[1].cancelled():
            following = self._turns.give_back(following[0])
        if following is not None:
            following[1].set_result(None)

    def _check_room(self, tenant: str, size_bytes: int) -> None:
        self._room.check()
        most = math.ceil(self._room.requests_max * SHARE_MAX)
        if self._turns.waiting_of(tenant) >= most:
            raise tenant_unread(most)
        of_tenant = self._bytes[tenant] + size_bytes > WAITING_BYTES_MAX * SHARE_MAX
        if of_tenant or self._bytes.total() + size_bytes > WAITING_BYTES_MAX:
            raise prompts_unread()


def too_late() -> DeadlineExceeded:
    """The error for a request whose prompt was not tokenized within its deadline."""
    return DeadlineExceeded("The deadline passed before the prompt was tokenized.")
