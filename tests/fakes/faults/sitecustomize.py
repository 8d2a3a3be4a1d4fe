"""Faults for the processes of a real mesh: Python runs this at its start where it is on the search path.

A worker whose `FAULT_FILE` holds the name of a revision cannot compute with it, from one step to the next, as
a kernel fails that meets what it was never tried with; after the word `dull` it says one and the same token.
One whose `SHORT_FILE` holds the name of a revision gets no memory when it loads it.

A controller whose `KILL_FILE` names a point of a rollout, as `before saved BAKING`, is killed there, once:
the file is gone then. So is the first worker that comes to the point in its `WORKER_KILL_FILE`: a phase and
a revision, as `LOAD r2`. Where a second line has process ids, these are killed instead of who comes there.
Others are left alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# A token of most vocabularies that ends nothing.
DULL_TOKEN = 100
# How long a phase lasts before the worker dies in it: its reports are out by then.
HOLD_S = 0.5


class FaultyRunner:
    """A revision's runner that fails while the file names the revision, or repeats one token after `dull`."""

    def __init__(self, revision: str, runner: Any, file: Path) -> None:
        self._revision, self._runner, self._file = revision, runner, file

    def __getattr__(self, name: str) -> Any:
        """All that is not a step is the runner's own."""
        return getattr(self._runner, name)

    def step(self, batch: Any) -> Any:
        """See `ModelRunner.step`."""
        asked = self._file.read_text() if self._file.exists() else ""
        if asked == self._revision:
            raise RuntimeError("a fault that a test asked for")
        choices = self._runner.step(batch)
        if asked == f"dull {self._revision}":
            return [replace(one, token_id=DULL_TOKEN) for one in choices]
        return choices


def _install(file: Path) -> None:
    from services.worker.core.stepper import Stepper  # noqa: PLC0415 - in workers alone

    host = Stepper._host

    def host_faulty(self: Stepper, revision: str, runner: Any) -> None:
        host(self, revision, FaultyRunner(revision, runner, file))

    Stepper._host = host_faulty  # type: ignore[method-assign]


def _install_shortage(file: Path) -> None:
    from services.worker.engine.preparation import Preparation  # noqa: PLC0415 - in workers alone

    load = Preparation._load

    async def load_short(self: Preparation, spec: Any, stages: Any) -> Any:
        loader: Any = self._loader
        real = type(loader)._load

        def short(*arguments: Any) -> Any:
            import torch  # noqa: PLC0415 - which the worker has imported

            if file.exists() and file.read_text() == spec.revision:
                # More than any machine has: the allocator's own words are what is tested.
                torch.empty(1 << 50, dtype=torch.uint8)
            return real(loader, *arguments)

        loader._load = short
        return await load(self, spec, stages)

    Preparation._load = load_short  # type: ignore[method-assign]


def _claim(file: Path, point: str) -> list[int]:
    """The processes to end here, if the file names the point: who asks first gets them, and nobody after."""
    try:
        named, _, pids = file.read_text().partition("\n")
        if named != point:
            return []
        file.unlink()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in pids.split()] or [os.getpid()]


def _kill(pids: list[int]) -> None:
    # Whoever kills ends last, for it would spare those after it.
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGKILL)


def _kill_at(file: Path, point: str) -> None:
    """Ends processes as SIGKILL does, if the file names the point."""
    _kill(_claim(file, point))


def _around(file: Path, verb: Callable[..., Awaitable[Any]], name: Callable[..., str]) -> Callable[..., Any]:
    """The verb with a point before and a point after it."""

    async def watched(*arguments: Any, **named: Any) -> Any:
        point = name(*arguments)
        _kill_at(file, f"before {point}")
        answer = await verb(*arguments, **named)
        _kill_at(file, f"after {point}")
        return answer

    return watched


def _install_kills(file: Path) -> None:
    from services.controller.adapters.file_rollouts import FileRolloutRecords  # noqa: PLC0415
    from services.controller.adapters.redis_route import RedisRouteStore  # noqa: PLC0415

    FileRolloutRecords.save = _around(  # type: ignore[method-assign]
        file, FileRolloutRecords.save, lambda _, rollout: f"saved {rollout.state.value}"
    )
    RedisRouteStore.write_route = _around(  # type: ignore[method-assign]
        file, RedisRouteStore.write_route, lambda *_: "routed"
    )
    RedisRouteStore.unready = _around(  # type: ignore[method-assign]
        file, RedisRouteStore.unready, lambda *_: "retired"
    )


def _install_worker_kills(file: Path) -> None:
    from services.worker.adapters.mesh_artifacts import MeshArtifacts  # noqa: PLC0415 - in workers alone
    from services.worker.adapters.torch_loader import TorchLoader  # noqa: PLC0415
    from services.worker.core.revision import Phase, Residency  # noqa: PLC0415
    from services.worker.engine.preparation import Preparation  # noqa: PLC0415

    fetch, enter, prove = MeshArtifacts.fetch, Residency.enter, Preparation._prove

    async def fetch_or_die(self: Any, spec: Any, progress: Any) -> Any:
        if pids := _claim(file, f"FETCH {spec.revision}"):
            await asyncio.sleep(HOLD_S)
            _kill(pids)
        return await fetch(self, spec, progress)

    def in_thread(phase: str, verb: Callable[..., Any], revision: Callable[..., str]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            if pids := _claim(file, f"{phase} {revision(*arguments)}"):
                time.sleep(HOLD_S)
                _kill(pids)
            return verb(*arguments)

        return watched

    def enter_or_die(self: Any, revision: str, phase: Any, **named: Any) -> None:
        enter(self, revision, phase, **named)
        # While a thread works on a phase there is time to tell of it; it is killed there.
        if phase not in {Phase.VERIFY, Phase.LOAD, Phase.WARM}:
            _kill_at(file, f"{phase.value} {revision}")

    MeshArtifacts.fetch = fetch_or_die  # type: ignore[method-assign]
    Residency.enter = enter_or_die  # type: ignore[method-assign]
    TorchLoader.verify = in_thread("VERIFY", TorchLoader.verify, lambda _, __, spec: spec.revision)  # type: ignore[method-assign]
    TorchLoader.load = in_thread("LOAD", TorchLoader.load, lambda _, __, spec, *___: spec.revision)  # type: ignore[method-assign]
    Preparation._prove = in_thread("WARM", prove, lambda _, __, spec, *___: spec.revision)  # type: ignore[method-assign]


if "services.worker" in sys.orig_argv and "FAULT_FILE" in os.environ:
    _install(Path(os.environ["FAULT_FILE"]))
if "services.worker" in sys.orig_argv and "SHORT_FILE" in os.environ:
    _install_shortage(Path(os.environ["SHORT_FILE"]))
if "services.controller" in sys.orig_argv and "KILL_FILE" in os.environ:
    _install_kills(Path(os.environ["KILL_FILE"]))
if "services.worker" in sys.orig_argv and "WORKER_KILL_FILE" in os.environ:
    _install_worker_kills(Path(os.environ["WORKER_KILL_FILE"]))
