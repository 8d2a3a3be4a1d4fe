"""Memory that is taken page by page. Owns: tensors of zeros that cost nothing where nothing is written."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch


def lazy_zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in the host's memory, of at least one element.

    The system gives a page when it is first written, full of zeros; reading what was never written takes
    none. `torch.zeros` writes all of it at once, which holds a step up for as long as that takes.

    Raises:
        MemoryError: The process may not have so much address space.
    """
    length = math.prod(size) * dtype.itemsize
    try:
        area = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{length} bytes cannot be mapped") from error
    with contextlib.suppress(OSError, AttributeError):
        # Where the system gives huge pages unasked, the first token of a row would take one for each head.
        area.madvise(mmap.MADV_NOHUGEPAGE)
    # The tensor keeps the area, and gives it back when it is freed.
    return torch.frombuffer(area, dtype=dtype).view(size)
