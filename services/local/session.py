"""One `interlock up`. Owns: its phases, signals and exit code, from the lock on the home to its release."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from services.common.clock import Clock
from services.common.end_signals import end_signals
from services.local.child import Event
from services.local.home import Home, HomeUnusable
from services.local.mesh import LocalMesh, ModelRead, PartReady
from services.local.owner_token import TOKEN_TTL_S, owner_token, renewed_token
from services.local.parts import MeshPlan
from services.local.ports import Ports
from services.local.state import MeshState

# Half of what a token must have left.
_TOKEN_LOOK_S = 1_800.0
# After a token could not be written: soon enough, and not so often that a broken disk is kept busy.
_TOKEN_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class MeshReady:
    """Requests can be answered."""

    state: MeshState


@dataclass(frozen=True, slots=True)
class Stopping:
    """Somebody asked for the end."""


Notice = Event | PartReady | ModelRead | MeshReady | Stopping


async def run(home: Home, plan: MeshPlan, ports: Ports, clock: Clock, tell: Callable[[Notice], None]) -> None:
    """Runs a mesh until a signal asks for its end; the caller holds the home's lock.

    Raises:
        PartFailed: A part could not start; everything else is stopped already.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    with _signals(stop, hurry):
        mesh = LocalMesh(home, plan, ports, clock, tell)
        # The secret may be another one than that of the mesh before.
        home.write_token(owner_token(home, TOKEN_TTL_S))
        renewing = asyncio.ensure_future(_keep_token_fresh(home))
        starting = asyncio.ensure_future(mesh.start())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                tell(MeshReady(starting.result()))
                await stop.wait()
        finally:
            try:
                tasks = (starting, stopping, renewing)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                tell(Stopping())
            finally:
                # Without it the kernel ends the processes with this one, in the middle of their streams.
                await mesh.stop(hurry)


async def _keep_token_fresh(home: Home) -> None:
    """A mesh may run longer than a token; the printed curl line goes on working."""
    pause_s = _TOKEN_LOOK_S
    while True:
        await asyncio.sleep(pause_s)
        try:
            renewed_token(home)
            pause_s = _TOKEN_LOOK_S
        except (OSError, HomeUnusable):
            pause_s = _TOKEN_RETRY_S


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first signal sets `stop`, the second `hurry`."""
    heard = end_signals(stop, hurry)
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, *_hangup())
    for number in numbers:
        loop.add_signal_handler(number, heard, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _hangup() -> tuple[signal.Signals, ...]:
    """SIGHUP, the end of the terminal; nothing where it is ignored, as `nohup` has it for its commands."""
    return () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a blocking block as Ctrl-C does, so that it cleans up behind itself."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, *_hangup())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
