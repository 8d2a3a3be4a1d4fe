"""Ties a program's life to its parent's. Owns: the one step between the supervisor and what it starts.

Run as `python -I -S leash.py PARENT_PID PROGRAM ARGUMENTS...`. The kernel kills the program when its parent
dies, by whatever means; a supervisor that was killed leaves nothing behind. It is a program of its own
because the wish must be made in the child after the fork, where a threaded parent may run no Python.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Asks for the signal and becomes the program; never returns."""
    parent_pid, *program = arguments
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("leash: this kernel cannot tie a process to its parent")
    # The parent may have died before the wish was made; then nobody would ever be told.
    if os.getppid() != int(parent_pid):
        sys.exit("leash: the supervisor is gone")
    os.execvp(program[0], program)  # noqa: S606 - a fixed argument list, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
