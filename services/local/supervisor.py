"""The supervisor. Owns: the children of one mesh, the wait until each can serve, the order of their end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.common.clock import Clock
from services.local.child import Child, Event, Launch
from services.local.log_file import tail

T = TypeVar("T")


class PartFailed(Exception):
    """A process could not serve; the message names it and shows the end of its log."""


@dataclass(frozen=True, slots=True)
class StopStage:
    """Children that end together.

    Attributes:
        ids: Their names.
        grace_s: How long they may take before they are killed.
    """

    ids: tuple[str, ...]
    grace_s: float


class Supervisor:
    """Starts children, keeps them running and ends them.

    Args:
        logs: Directory of their logs.
        clock: For the length of their runs.
        tell: Hears of starts and crashes.
    """

    def __init__(self, logs: Path, clock: Clock, tell: Callable[[Event], None]) -> None:
        self._logs = logs
        self._clock = clock
        self._tell = tell
        self._children: dict[str, Child] = {}

    async def start(self, id: str, launch: Callable[[], Launch]) -> Child:  # noqa: A002 - the field's name
        """Starts a process and keeps it running until `stop`.

        Raises:
            PartFailed: It cannot be started at all.
        """
        child = Child(id, launch, self._logs / f"{id}.log", self._clock, self._tell)
        self._children[id] = child
        try:
            await child.start()
        except OSError as error:
            raise PartFailed(f"{id} cannot be started: {error}") from None
        return child

    async def ready(self, child: Child, waiting: Awaitable[T], timeout_s: float) -> T:
        """The result of `waiting`, unless the child ends first or time runs out.

        Raises:
            PartFailed: It ended, or was not ready in time.
        """
        answer = asyncio.ensure_future(waiting)
        crash = asyncio.ensure_future(child.crashed())
        try:
            await asyncio.wait({answer, crash}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            why = "ended at its start" if crash.done() else f"was not ready within {timeout_s:.0f} s"
            raise failed(child, why)
        finally:
            for task in (answer, crash):
                task.cancel()
            await asyncio.gather(answer, crash, return_exceptions=True)

    async def stop(self, stages: Sequence[StopStage], hurry: asyncio.Event) -> None:
        """Ends the children stage by stage; `hurry` kills what is left at once."""
        orderly = asyncio.ensure_future(self._stop_in_order(stages))
        hurrying = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({orderly, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if hurrying.done():
            for child in self._children.values():
                child.kill()
        hurrying.cancel()
        # Killed children end the remaining stages by themselves, each within a bounded wait.
        await orderly

    async def _stop_in_order(self, stages: Sequence[StopStage]) -> None:
        for stage in stages:
            children = [self._children[id_] for id_ in stage.ids if id_ in self._children]
            await asyncio.gather(*(child.stop(stage.grace_s) for child in children))


def failed(child: Child, why: str) -> PartFailed:
    """The error of a child, with the end of its log."""
    shown = tail(child.log, from_byte=child.log_start_bytes) or "(it wrote nothing)"
    indented = "\n".join(f"    {line}" for line in shown.splitlines())
    return PartFailed(f"{child.id} {why}. The end of {child.log}:\n{indented}")
