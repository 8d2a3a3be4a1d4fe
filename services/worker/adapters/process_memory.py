"""Memory of the machine and of this process, from /proc. Owns: where those figures are read."""

from __future__ import annotations

import os
from pathlib import Path

# A machine without /proc gives the KV cache this much, and says so in its report.
AVAILABLE_BYTES_DEFAULT = 2 << 30


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where it cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes; control groups are heeded.

    Files that this process has mapped do not count as free, though the kernel could drop them: weights are
    read again in every step.
    """
    available = [_meminfo_available(), _cgroup_available()]
    known = [value for value in available if value is not None]
    return max(0, min(known) - _mapped_file_bytes()) if known else AVAILABLE_BYTES_DEFAULT


def _mapped_file_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup_available() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        return max(0, int(limit) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        return None
