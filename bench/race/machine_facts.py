"""The machine and its libraries, in words. Owns: what every report says of where it was measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "bitsandbytes")


def machine_line(threads: int) -> str:
    """One sentence: processor, cores, memory, libraries and the day."""
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return f"{processor_line()}; {threads} threads; {libraries}; {today}."


def processor_line() -> str:
    """Processor, cores and memory."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
