"""Noise. Owns: the randomness of sampling, as a pure function of `(seed, sequence, index)`.

A sequence draws the same numbers alone, in any batch, and on any worker that goes on with it.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1

# The increment and multipliers of splitmix64 (Steele, Lea and Flood, 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniform(seed: int, sequence: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ _mix(sequence + 1))
    state = _mix(state ^ _mix(index + 1))
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)
