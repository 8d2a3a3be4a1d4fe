"""Work that is bound to one time of leading: it ends with it, and none begins afterwards."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import NotLeader
from services.controller.adapters.while_leading import WhileLeading, nobody_else_leads


@pytest.mark.parametrize("late", [False, True])
async def test_work_ends_with_the_lead_or_does_not_begin(late: bool) -> None:  # noqa: FBT001
    """Nobody would end what begins late."""
    leading, begun = WhileLeading(nobody_else_leads), asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    if late:
        leading.close()
    running = asyncio.create_task(leading.run(work()))
    if not late:
        await begun.wait()
        leading.close()
    with pytest.raises(NotLeader):
        await asyncio.wait_for(running, 5)
    assert begun.is_set() is not late
