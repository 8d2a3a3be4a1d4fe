"""Waiting for several things. Owns: that one failure ends the wait for the others, and is told as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from services.local.supervisor import PartFailed

T = TypeVar("T")


async def together(*waits: Coroutine[Any, Any, None]) -> None:
    """Waits for all; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for wait in waits:
                group.create_task(wait)
    except* PartFailed as failures:
        raise failures.exceptions[0] from None


async def unless_failed(wanted: Coroutine[Any, Any, T], watches: Iterable[Coroutine[Any, Any, None]]) -> T:
    """The result of `wanted`, unless one of the watches raises first; none of these ends otherwise."""
    main = asyncio.ensure_future(wanted)
    watching = [asyncio.ensure_future(watch) for watch in watches]
    try:
        done, _ = await asyncio.wait({main, *watching}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {main}:
            task.result()
        return main.result()
    finally:
        for task in (main, *watching):
            task.cancel()
        await asyncio.gather(main, *watching, return_exceptions=True)
