"""Room for weights. Owns: whether a revision may be loaded beside what is loaded. Pure.

Of what a load needs, weights are what is known before; for all else the allocator has the word.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.common.errors import ArtifactInvalid
from services.worker.core.revision import Resident

MEGABYTE = 1_000_000


def check_room(needed_bytes: int, others: Iterable[Resident], memory_bytes: int) -> None:
    """Sees that weights fit.

    Args:
        needed_bytes: What they take, as far as it is known.
        others: The revisions that will be there beside them.
        memory_bytes: What all weights of the worker may take; 0: no bound is known.

    Raises:
        ArtifactInvalid: They do not; the message says what there is, and what to do.
    """
    held_bytes = sum(one.weights_bytes for one in others)
    if not memory_bytes or needed_bytes + held_bytes <= memory_bytes:
        return
    needs = f"Its weights need {_megabytes(needed_bytes)} of memory"
    has = f"the worker may use {_megabytes(memory_bytes)}"
    if needed_bytes <= memory_bytes:
        held = f"of which other revisions hold {_megabytes(held_bytes)}"
        raise ArtifactInvalid(f"{needs}; {has}, {held}. Roll it out with the strategy swap.")
    raise ArtifactInvalid(f"{needs}; {has}. Choose a smaller quantization, or give it more memory_bytes.")


def _megabytes(size_bytes: int) -> str:
    return f"{-(-size_bytes // MEGABYTE)} MB"
