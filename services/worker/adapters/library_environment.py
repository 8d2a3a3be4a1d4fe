"""Foreign libraries. Owns: the environment that torch and transformers find when they are imported."""

from __future__ import annotations

import os


def prepare() -> None:
    """Sets what the libraries read when they are imported; what the user has set stays."""
    # Nothing is fetched from anywhere but the controller.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # OpenMP threads that spin for milliseconds starve the mesh's other processes on the same cores, and
    # are starved by them. Beside one busy process on two cores, 8 rows decoded 26 tokens/s with the
    # library's spin and 69 with this one; alone 285 and 270.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Weights on large pages stream a few per cent faster, and one row does little else.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
