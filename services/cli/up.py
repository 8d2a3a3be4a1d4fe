"""`interlock up`. Owns: the way from its arguments to a running mesh, in front or in the background."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from services.cli.failure import CommandFailed
from services.cli.terminal import Terminal, invitation
from services.common.system_clock import SystemClock
from services.common.tokens import SecretWeak
from services.local import model_files, ports, progress_bar, session, state
from services.local.home import Home, HomeInUse, HomeUnusable
from services.local.log_file import tail
from services.local.model_store import CATALOGUE, ModelStore, ModelUnavailable
from services.local.parts import MeshPlan
from services.local.process_toolbox import ProcessToolbox
from services.local.supervisor import PartFailed

# Everything that has a message for the user.
_FAILURES = (HomeInUse, HomeUnusable, ModelUnavailable, PartFailed, SecretWeak, ports.PortsTaken)

_LOOK_S = 0.1


def run(arguments: argparse.Namespace) -> int:
    """Runs a mesh until it is stopped, or starts one in the background."""
    home = Home.of_environment(os.environ)
    try:
        return _detach(home, arguments) if arguments.detach else _run(home, arguments)
    except _FAILURES as error:
        raise CommandFailed(str(error)) from None


def _run(home: Home, arguments: argparse.Namespace) -> int:
    wanted = ports.plan(
        arguments.port,
        gateways=arguments.gateways,
        workers=arguments.workers,
        controllers=arguments.controllers,
    )
    with home.locked():
        with session.ended_by_signals():
            ports.check_free(wanted, partial(print, flush=True))
            began_s = time.monotonic()
            name, path = _model(home, arguments.model)
        plan = MeshPlan(
            model_path=path,
            model_name=name,
            workers=arguments.workers,
            gateways=arguments.gateways,
            controllers=arguments.controllers,
            quantization=arguments.quantization,
            dtype=arguments.dtype,
            port=arguments.port,
            worker_memory_bytes=arguments.worker_memory_bytes,
        )
        terminal = Terminal(home, time.monotonic() - began_s)
        print(f"Starting {name} in {home.path}", flush=True)
        asyncio.run(session.run(home, plan, wanted, SystemClock(), terminal.tell))
    return 0


def _model(home: Home, wanted: str) -> tuple[str, Path]:
    """Name and directory of the model, fetched first when that is needed."""
    if not wanted.strip():
        raise ModelUnavailable("--model is empty; give a name or a directory.")
    path = Path(wanted)
    if wanted not in CATALOGUE and (os.sep in wanted or path.exists()):
        model_files.check(path)
        return _name_of(path), path.resolve()
    store = ModelStore(home.models, ProcessToolbox())
    found = store.find(wanted) if wanted in CATALOGUE else None
    if found is None:
        store.check_known(wanted)
        with progress_bar.shown(wanted, home.models) as progress:
            found = store.fetch(wanted, progress)
    model_files.check(found)
    return wanted, found


def _name_of(path: Path) -> str:
    """A model's name from its directory's: what the contract allows of it."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).lstrip("._-")[:63]
    return name or "model"


def _detach(home: Home, arguments: argparse.Namespace) -> int:
    # Refused where a mesh runs. What one that died has left goes: below it would be read as the new one's.
    with home.locked():
        log = home.logs / "up.log"
    with log.open("wb") as output:
        # Not leashed: it shall outlive this command and its terminal.
        process = subprocess.Popen(
            (sys.executable, "-P", "-m", "services.cli", "up", *_repeated(arguments)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return _await_ready(home, process, log)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _await_ready(home: Home, process: subprocess.Popen[bytes], log: Path) -> int:
    while process.poll() is None:
        found = state.read(home.state_file)
        if found is not None and found.pid == process.pid:
            print(invitation(home, found))
            # It is not waited for; without this Python would warn about a child that still runs.
            process.returncode = 0
            return 0
        time.sleep(_LOOK_S)
    raise CommandFailed(f"the mesh did not start. The end of {log}:\n{tail(log)}")


def _repeated(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The arguments of the same command without `--detach`."""
    options = ["controllers", "workers", "gateways", "model", "quantization", "dtype", "port"]
    if arguments.worker_memory_bytes:
        options.append("worker_memory_bytes")
    return tuple(f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in options)
