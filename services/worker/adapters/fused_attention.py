"""Attention of one token. Owns: its arithmetic over keys and values in half precision.

There are no masks and no buckets: a token attends to as many positions as its row has before it, and itself,
in an order that its position alone decides.
"""

from __future__ import annotations

from services.worker.adapters.vector_code import F16, F32, LANES, Array, Lane, Value, Variable
from services.worker.adapters.vector_math import exponential
from services.worker.adapters.vector_program import Sweep

# So many keys lie side by side: one instruction takes a component of all of them.
BLOCK_POSITIONS = LANES

# The scores of so many positions are held at a time.
SPAN_POSITIONS = 128

HALF_MAX = 65_504.0

# Less than any finite score.
LOWEST = -3.0e38


class Attention:
    """Attention of a group of queries to one head of keys: span by span, each brought to one measure."""

    def __init__(self, code: Sweep, queries: Array, group: int, dim: int, scale: float) -> None:
        self._code, self._queries = code, queries
        self._group, self._dim, self._scale = group, dim, scale
        self._vectors = -(-dim // LANES)
        self._scores = code.room(group * SPAN_POSITIONS, F32)
        self._best = [Variable(code, code.number(LOWEST)) for _ in range(group)]
        self._mass = [Variable(code, code.number(0.0)) for _ in range(group)]
        self._sums = [Variable(code, code.filled(0.0)) for _ in range(group * self._vectors)]

    def run(self, keys: Array, values: Array, length: Value) -> None:
        """Writes the weighted sums in the place of the queries."""
        code, dim = self._code, self._dim
        with code.loop(0, length, SPAN_POSITIONS) as first:
            rest = length - first
            count = code.select(rest > SPAN_POSITIONS, SPAN_POSITIONS, rest)
            with code.loop(0, count, BLOCK_POSITIONS) as place:
                self._score(keys.at((first + place) * dim), place, count)
            for query in range(self._group):
                self._weigh(query, count)
            with code.loop(0, count) as place:
                self._add(values.at((first + place) * dim), place)
        for query in range(self._group):
            share = code.number(1.0) / self._mass[query].get()
            for vector, lane in enumerate(self._lanes()):
                whole = self._sums[query * self._vectors + vector].get() * share
                lane.store(self._queries.at(query * dim), whole)

    def _score(self, keys: Array, place: Value, count: Value) -> None:
        """The scores of one block; those behind the end are the lowest."""
        code = self._code
        scores = [Variable(code, code.filled(0.0)) for _ in range(self._group)]
        with code.loop(0, self._dim) as index:
            key = code.converted(keys.gather(index * BLOCK_POSITIONS), F32)
            for query, score in enumerate(scores):
                number = self._queries.get(index + query * self._dim)
                score.set(code.fused(code.spread(number), key, score.get()))
        behind = code.ramp() + place
        for query, score in enumerate(scores):
            seen = code.select(behind >= count, LOWEST, score.get() * self._scale)
            self._scores.spill(place + query * SPAN_POSITIONS, seen)

    def _weigh(self, query: int, count: Value) -> None:
        """From the scores of a span to weights; what was summed before is brought to the same measure."""
        code, scores = self._code, self._scores.at(query * SPAN_POSITIONS)
        highest = Variable(code, code.filled(LOWEST))
        with code.loop(0, count, LANES) as place:
            highest.set(code.largest(scores.gather(place), highest.get()))
        before = self._best[query].get()
        best = code.largest(code.peak(highest.get()), before)
        mass = Variable(code, code.filled(0.0))
        with code.loop(0, count, LANES) as place:
            weights = exponential(code, scores.gather(place) - best)
            scores.spill(place, weights)
            mass.set(mass.get() + weights)
        decay = exponential(code, before - best)
        self._mass[query].set(code.fused(self._mass[query].get(), decay, code.total(mass.get())))
        self._best[query].set(best)
        for vector in range(self._vectors):
            summed = self._sums[query * self._vectors + vector]
            summed.set(summed.get() * decay)

    def _add(self, values: Array, place: Value) -> None:
        """Adds the values of one position with their weights."""
        code = self._code
        found = [code.converted(lane.load(values, F16), F32) for lane in self._lanes()]
        for query in range(self._group):
            weight = code.spread(self._scores.get(place + query * SPAN_POSITIONS))
            for vector, value in enumerate(found):
                summed = self._sums[query * self._vectors + vector]
                summed.set(code.fused(weight, value, summed.get()))

    def _lanes(self) -> list[Lane]:
        return [self._code.lane(first, self._dim) for first in range(0, self._dim, LANES)]


def halved(code: Sweep, numbers: Value) -> Value:
    """In half precision; what is too large for it is the largest."""
    low = code.select(numbers < -HALF_MAX, -HALF_MAX, numbers)
    return code.converted(code.select(low > HALF_MAX, HALF_MAX, low), F16)
