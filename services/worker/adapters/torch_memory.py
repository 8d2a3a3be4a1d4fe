"""Memory that is short. Owns: how torch, its libraries and the system say so, as one kind of error."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

# What torch's allocator on CPU says; it has no class of its own.
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory")
# Libraries wrap errors once or twice.
_CAUSES_MAX = 8


@contextlib.contextmanager
def shortage_named() -> Iterator[None]:
    """Lets work on tensors end in MemoryError wherever memory is what it lacked.

    Raises:
        MemoryError: There was not enough, on whichever device.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if _is_shortage(error):
            raise MemoryError from error
        raise


def _is_shortage(error: BaseException) -> bool:
    cause: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if cause is None:
            return False
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause) for words in _ALLOCATOR_WORDS):
            return True
        cause = cause.__cause__
    return False
