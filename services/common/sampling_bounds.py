"""Bounds of sampling that two services must agree on. Owns: from where on a number is too small to divide by.

Numbers travel in single precision, in which neither bound can be spelled; so both are what it makes of them,
and one that a gateway takes is never one that a worker refuses.
"""

from __future__ import annotations

import struct


def _single(value: float) -> float:
    """The number in single precision that is nearest."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


# Below it sampling is greedy. Logits that differ by 0.001 are e**100 apart there, so that noise has no say
# any more; and a logit divided by it is finite in single precision up to 3e33, where those of models have two
# digits, and what bias and penalties make of them at most eight.
TEMPERATURE_SAMPLED_MIN = _single(1e-5)

# It multiplies the logits of what was seen by a hundred, which no model's distribution survives, and leaves
# them finite.
REPETITION_PENALTY_MIN = _single(0.01)


def is_greedy(temperature: float) -> bool:
    """Whether the most likely token is taken, and nothing is drawn."""
    return temperature < TEMPERATURE_SAMPLED_MIN
