"""Processor time of processes, by Linux's count. Owns: reading it, and who of a mesh used how much.

What a mesh loses to anything but its workers shows here whatever the machine's speed: on a machine where
every core is busy, tokens come in proportion to the cores that the workers have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

Seconds = Mapping[str, float]


def cpu_s(pid: int) -> float:
    """Seconds that a process's threads have computed; 0 where there is none, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Ledger:
    """What each kind of process has used.

    Args:
        processes: Kinds and process ids; this process is `client`.
    """

    def __init__(self, processes: Iterable[tuple[str, int]] = ()) -> None:
        self._processes = (*processes, ("client", os.getpid()))

    def read(self) -> tuple[float, Seconds]:
        """The time of a monotonic clock, and seconds by kind until then."""
        used: dict[str, float] = {}
        for kind, pid in self._processes:
            used[kind] = used.get(kind, 0.0) + cpu_s(pid)
        return time.monotonic(), used


def cores_between(first: tuple[float, Seconds], last: tuple[float, Seconds]) -> dict[str, float]:
    """Cores that each kind kept busy in the mean from one reading to the other."""
    elapsed_s = last[0] - first[0]
    return {kind: round((used_s - first[1][kind]) / elapsed_s, 3) for kind, used_s in last[1].items()}
