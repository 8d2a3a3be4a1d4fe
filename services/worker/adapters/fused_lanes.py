"""Passes in lanes. Owns: how a step's tokens go through the layers, all together or in two halves.

Together, all threads share each product, and meet again after it, some two hundred times a step. Whoever
loses its core to another process holds up the others each time, so that a mesh on few cores loses its
gateway's share of them twice. In lanes each half of the sequences goes its own way to the end of the step,
on a thread of its own; the weights are read twice, which costs little where there is enough to multiply.
No token's numbers depend on its neighbours, so both ways give the same. The faster one lately is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from services.worker.adapters.fused_decoder import FusedDecoder
from services.worker.adapters.fused_pass import FusedPass
from services.worker.adapters.lane_thread import Promise, beside
from services.worker.adapters.lean_cache import LeanRows
from services.worker.core.ways import Ways

LANES = 2
# With so many threads, or more, a lane of one would be too slow.
THREADS_TOO_MANY = 2 * LANES
# With fewer tokens in a lane reading the weights takes longer than multiplying with them.
LANE_TOKENS = 4
# The most that the heavier lane may have to do, of all.
HEAVIER_MAX = 0.6

_TOGETHER, _IN_LANES = range(2)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a step; see `FusedPass.forward`."""

    ids: Sequence[int]
    rows: Sequence[int]
    positions: Sequence[int]
    drawn: Sequence[int]

    def part(self, first: int, last: int) -> Tokens:
        """Those from one to below another."""
        drawn = [index - first for index in self.drawn if first <= index < last]
        return Tokens(self.ids[first:last], self.rows[first:last], self.positions[first:last], drawn)


class FusedLanes:
    """Passes of one decoder; one step at a time.

    Args:
        decoder: The model.
        rows: Its cache.
        threads: How many take part.
        clock: Measures, in seconds.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        rows: LeanRows,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._turns = decoder.turns
        self._threads = threads
        self._clock = clock
        self._passes = [
            FusedPass(decoder, rows) for _ in range(LANES if LANES <= threads < THREADS_TOO_MANY else 1)
        ]
        # By the power of two above the number of tokens.
        self._ways: dict[int, Ways] = {}
        self._position_cost = _position_cost(decoder)

    @property
    def bytes(self) -> int:
        """Memory that the passes may come to take beside the weights."""
        return sum(one.bytes for one in self._passes)

    def forward(self, tokens: Tokens) -> list[torch.Tensor]:
        """Passes the tokens of a step, the faster way.

        Returns:
            Logits, `[drawn, vocabulary]`, in one piece or several.
        """
        costs = [1.0 + position * self._position_cost for position in tokens.positions]
        cut = cut_of(tokens.rows, costs) if len(self._passes) == LANES else None
        if cut is None:
            return [self.together(tokens)]
        ways = self._ways.setdefault(len(costs).bit_length(), Ways())
        way, began_s = ways.choose(), self._clock()
        try:
            found = self.in_lanes(tokens, cut) if way == _IN_LANES else [self.together(tokens)]
        except BaseException:
            ways.fail(way)
            raise
        ways.note(way, sum(costs), self._clock() - began_s)
        return found

    def together(self, tokens: Tokens) -> torch.Tensor:
        """All tokens in one pass, with all threads."""
        one = self._passes[0]
        return one.forward(tokens.ids, tokens.rows, tokens.positions, tokens.drawn, self._threads)

    def in_lanes(self, tokens: Tokens, cut: int) -> list[torch.Tensor]:
        """Those before `cut` and those from there on at the same time; no row has tokens on both sides."""
        # What both read is made before they begin.
        self._turns.table(max(tokens.positions) + 1)
        parts = (tokens.part(0, cut), tokens.part(cut, len(tokens.ids)))
        promises: list[Promise[torch.Tensor]] = []
        try:
            for lane, (one, part) in enumerate(zip(self._passes, parts, strict=True)):
                passing = partial(one.forward, part.ids, part.rows, part.positions, part.drawn, 1)
                promises.append(beside(lane, passing))
        finally:
            # Nobody may touch rows and weights before all that began have ended.
            for promise in promises:
                promise.wait()
        return [promise.fetch() for promise in promises]

    def give_up(self) -> None:
        """Lets go of layers and rows; nothing passes from then on."""
        for one in self._passes:
            one.give_up()


def cut_of(rows: Sequence[int], costs: Sequence[float]) -> int | None:
    """Where a step is cut in two: between two rows, as near to half of its work as can be.

    Returns:
        The index of the first token of the second lane; None where a lane would have too little to do.
    """
    tokens = len(rows)
    if tokens < LANES * LANE_TOKENS:
        return None
    done = list(accumulate(costs))
    places = (at for at in range(LANE_TOKENS, tokens - LANE_TOKENS + 1) if rows[at - 1] != rows[at])
    cut = min(places, key=lambda at: abs(2 * done[at - 1] - done[-1]), default=None)
    if cut is None or not 1 - HEAVIER_MAX <= done[cut - 1] / done[-1] <= HEAVIER_MAX:
        return None
    return cut


def _position_cost(decoder: FusedDecoder) -> float:
    """What a position that is attended to costs, as a part of a token's products."""
    shape = decoder.shape
    products = sum(weight.inputs * weight.outputs for weight in decoder.weights)
    return 2 * shape.queries * shape.head_dim * len(decoder.layers) / products
