"""The way to one member: what waits for it has a bound, whether it reads or not."""

from __future__ import annotations

import pytest

from services.common.errors import Draining
from services.controller.adapters.member_outbox import COMMANDS_WAITING_MAX, MemberOutbox
from services.controller.core.commands import Command, SendAbort, SendLease, SendRetire


async def read(outbox: MemberOutbox) -> list[Command]:
    """What a member reads until its stream ends in peace."""
    return [command async for command in outbox]


async def test_a_newer_renewal_takes_the_place_of_one_that_waits() -> None:
    """Nobody needs the older one; between other commands each keeps its place, for order has a meaning."""
    outbox = MemberOutbox()
    outbox.send(SendLease(5.0, 1))
    outbox.send(SendRetire("a"))
    for fence in range(2, 2 + 2 * COMMANDS_WAITING_MAX):
        outbox.send(SendLease(5.0, fence))
    outbox.send(SendAbort("b"))
    outbox.fail(None)
    last = SendLease(5.0, 1 + 2 * COMMANDS_WAITING_MAX)
    assert await read(outbox) == [SendLease(5.0, 1), SendRetire("a"), last, SendAbort("b")]


async def test_after_the_end_nothing_waits_any_more() -> None:
    """The member is told what was sent before, then why it ended, and no command after that."""
    outbox = MemberOutbox()
    for number in range(3 * COMMANDS_WAITING_MAX):
        outbox.send(SendRetire(str(number)))
    heard: list[Command] = []

    async def read_slowly() -> None:
        async for command in outbox:
            heard.append(command)
            outbox.send(SendLease(5.0, 1))

    with pytest.raises(Draining, match="does not read"):
        await read_slowly()
    assert heard == [SendRetire(str(number)) for number in range(COMMANDS_WAITING_MAX)]
