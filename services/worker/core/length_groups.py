"""Groups by length. Owns: which rows decode together, so that short ones do not pay for a long one. Pure.

A pass reads as many positions of every row as its longest row has. A second pass costs the weights once
more; it pays when it saves more positions than that.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.core.batch import Decode
from services.worker.core.kv_budget import bucketed


def split_by_length(decodes: Sequence[Decode], pass_positions: int) -> tuple[tuple[Decode, ...], ...]:
    """One group or two, each by ascending row.

    Args:
        decodes: At least one.
        pass_positions: Positions whose attention costs as much as one more pass.
    """
    lengths = sorted(bucketed(decode.position + 1) for decode in decodes)
    longest = lengths[-1]
    saved, limit = max((rows * (longest - length), length) for rows, length in enumerate(lengths, start=1))
    if saved <= pass_positions:
        return (tuple(decodes),)
    short = tuple(decode for decode in decodes if bucketed(decode.position + 1) <= limit)
    long = tuple(decode for decode in decodes if bucketed(decode.position + 1) > limit)
    return short, long
