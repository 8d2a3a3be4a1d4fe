"""`interlock down`. Owns: how the supervisor of a home is ended from outside."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time

from services.cli.failure import CommandFailed
from services.local.home import Home

# The supervisor gives its stages 35 + 35 + 10 + 10 + 10 s and then kills; what is longer is a hang.
_ORDERLY_S = 110.0
# Its children end with it; the kernel needs a moment.
_KILLED_S = 5.0
_LOOK_S = 0.05


def run(arguments: argparse.Namespace) -> int:
    """Ends the mesh and waits for its end."""
    del arguments
    home = Home.of_environment(os.environ)
    pid = home.holder()
    if pid is None:
        raise CommandFailed(f"no mesh runs in {home.path}.")
    print(f"Stopping the mesh in {home.path} (process {pid})")
    _send(pid, signal.SIGTERM)
    if _ended(home, pid, _ORDERLY_S):
        return 0
    print("It does not end; killing it. Its processes end with it.")
    _send(pid, signal.SIGKILL)
    if not _ended(home, pid, _KILLED_S):
        raise CommandFailed(f"process {pid} cannot be killed.")
    # Nobody was left to clean up: whoever holds the lock next does, and this is as good a moment as any.
    with home.locked():
        return 0


def _send(pid: int, number: signal.Signals) -> None:
    # It may have ended by itself meanwhile, which is what is wanted.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _ended(home: Home, pid: int, within_s: float) -> bool:
    """Whether the lock is released in time: then every process, socket and file is gone."""
    end_s = time.monotonic() + within_s
    while home.holder() == pid:
        if time.monotonic() > end_s:
            return False
        time.sleep(_LOOK_S)
    return True
