"""Memory of a process, by its id. Owns: how its present and its peak are read from the kernel."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

# What `clear_refs` understands as: the peak begins again at what is resident now.
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory in bytes, now and at most since the last reset; 0 where it cannot be read."""

    resident_bytes: int
    peak_bytes: int


def reset_peak(pid: int) -> None:
    """Lets the peak begin again; without the right to do so, it goes on from the start of the process."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def memory_of(pid: int) -> Memory:
    """The memory of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Memory(0, 0)
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return Memory(_bytes(fields.get("VmRSS", "")), _bytes(fields.get("VmHWM", "")))


def _bytes(kibibytes: str) -> int:
    words = kibibytes.split()
    return int(words[0]) * 1024 if words else 0
