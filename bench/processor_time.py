"""Processor time of processes, by Linux's count. Owns: reading it, and who of a mesh used how much.

What a mesh loses to anything but its workers shows here whatever the machine's speed: on a machine where
every core is busy, tokens come in proportion to the cores that the workers have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Processes = Iterable[tuple[str, int]]


def cpu_s(pid: int) -> float:
    """Seconds that a process's threads have computed.

    Raises:
        OSError: There is no such process, or the system does not tell.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Usage:
    """What each kind of process uses from now on.

    Args:
        processes: Kinds and process ids.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = tuple(processes)
        self._began_s = time.monotonic()
        self._before = self._read()

    def cores(self) -> dict[str, float]:
        """Cores that each kind kept busy in the mean until now; not of kinds of which a process has ended."""
        elapsed_s, now = time.monotonic() - self._began_s, self._read()
        ended = {kind for kind, pid in self._processes if (kind, pid) not in now.keys() & self._before.keys()}
        found: dict[str, float] = {}
        for (kind, pid), used_s in now.items():
            if kind not in ended:
                found[kind] = found.get(kind, 0.0) + (used_s - self._before[kind, pid]) / elapsed_s
        return {kind: round(cores, 3) for kind, cores in found.items()}

    def _read(self) -> Mapping[tuple[str, int], float]:
        used: dict[tuple[str, int], float] = {}
        for kind, pid in self._processes:
            try:
                used[kind, pid] = cpu_s(pid)
            except OSError:
                continue
        return used


def client_alone() -> Processes:
    """This process, as the client of a mesh that is not known."""
    return (("client", os.getpid()),)


Listing = Callable[[], Processes]
