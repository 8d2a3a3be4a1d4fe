"""Foreign libraries. Owns: the environment that torch and transformers find when they are imported."""

from __future__ import annotations

import os
from pathlib import Path

# What a container may use of the processors, as Linux tells it: microseconds in each period.
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

# oneDNN keeps a program of some 70 KB for each shape that it has multiplied, 1,024 of them unless told: a
# worker that saw batches of every size grew by 170 MB. A step has about five shapes for each number of rows,
# of which there are some forty, see `row_counts`: one that is forgotten costs 5 ms when it comes again.
PRIMITIVES_MAX = 512


def prepare(threads: int = 0) -> int:
    """Sets what the libraries read when they are imported; what the user has set stays.

    Args:
        threads: Those of a forward pass on a CPU; 0: as many as there are cores to use.

    Returns:
        How many threads that is. It is found out here: a bound OpenMP takes the thread that imports torch for
        its first one, and leaves it a single core.
    """
    allowed = len(os.sched_getaffinity(0))
    chosen = threads or min(allowed, _quota(CPU_MAX))
    # Nothing is fetched from anywhere but the controller.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # OpenMP threads that spin for milliseconds starve the mesh's other processes on the same cores, and
    # are starved by them: beside one busy process on two cores, 8 rows decoded 26 tokens/s with the
    # library's spin, and about 80 with this one or a fifth of it. Threads that sleep take long to wake:
    # alone, one row decodes 52 tokens/s with this, 35 with a fifth of it, 8 rows 211 and 165.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Threads that wander between cores while gateway and Envoy run there lose each other at barriers. Bound
    # to their cores, a mesh on two cores gave 61 tokens/s for one stream and 328 for 16, else 46 and 269.
    # With fewer threads than cores, several workers would all be bound to the first ones.
    if chosen == allowed:
        os.environ.setdefault("OMP_PROC_BIND", "true")
    # Weights on large pages stream a few per cent faster, and one row does little else.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES_MAX))
    return chosen


def _quota(file: Path) -> int:
    """Whole cores that a container's limit is worth, at least one; more than any machine has without one."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        # There is no such file where nothing is limited so, and "max" in it where nothing is limited.
        return 1 << 20
