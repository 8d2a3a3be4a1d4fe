"""The buckets of times to the first token. Gateways count in them, the controller compares them."""

from __future__ import annotations

from bisect import bisect_left

# A quarter more from bound to bound: far finer than the differences that anybody is judged by.
_GROWTH = 1.25
_FIRST_S = 0.001
_BOUNDS = 58

# Upper bounds in seconds, from a millisecond to more than any deadline; one bucket more holds the rest.
BOUNDS_S = tuple(_FIRST_S * _GROWTH**power for power in range(_BOUNDS))
BUCKETS = len(BOUNDS_S) + 1


def bucket_of(seconds: float) -> int:
    """The bucket that counts a time, 0 to `BUCKETS` - 1."""
    return bisect_left(BOUNDS_S, seconds)
