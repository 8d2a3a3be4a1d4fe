"""Memory of the machine and of this process, from /proc. Owns: where those figures are read."""

from __future__ import annotations

import os
from pathlib import Path

# A machine without /proc gives the KV cache this much, and says so in its report.
AVAILABLE_BYTES_DEFAULT = 2 << 30

# Where a container sees the limits of its own control group.
CGROUP = Path("/sys/fs/cgroup")


def machine_bytes() -> int:
    """Memory that there is to use, taken or not, in bytes; control groups are heeded."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit(CGROUP)
    return physical if limit is None else min(physical, limit)


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where it cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes; control groups are heeded.

    Files that this process has mapped do not count as free, though the kernel could drop them: weights are
    read again in every step. Other pages of files do: what was downloaded or written, and is on the disk.
    """
    mapped_bytes = _mapped_file_bytes()
    machine = _meminfo_available()
    available = [
        None if machine is None else machine - mapped_bytes,
        _cgroup_available(CGROUP, mapped_bytes),
    ]
    known = [value for value in available if value is not None]
    return max(0, min(known)) if known else AVAILABLE_BYTES_DEFAULT


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


def _cgroup_limit(root: Path) -> int | None:
    """The limit of a control group; None: it has none."""
    try:
        return int((root / "memory.max").read_text())
    except (OSError, ValueError):
        # There is no such file where nothing is limited so, and "max" in it where nothing is limited.
        return None


def _cgroup_available(root: Path, mapped_bytes: int) -> int | None:
    """What a control group leaves; None: it has no limit.

    Its use includes the pages of files, mapped or not, so that those which are mapped are taken from what
    can be dropped, and from nothing else. They may be another group's: whoever reads a page first has it.
    """
    limit = _cgroup_limit(root)
    if limit is None:
        return None
    try:
        left = limit - int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(0, left + max(0, _file_bytes(root) - mapped_bytes))


def _file_bytes(root: Path) -> int:
    """The pages of files that a control group holds and the kernel could drop; 0 where it does not say."""
    try:
        lines = (root / "memory.stat").read_text().splitlines()
        values = dict(line.split() for line in lines)
        return int(values["inactive_file"]) + int(values["active_file"])
    except (OSError, ValueError, KeyError):
        return 0
