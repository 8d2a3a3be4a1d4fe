"""The ratios that the engine is held to. Owns: which figures are divided by which, and the bounds. Pure.

A ratio is taken within each lap, and the median over the laps is quoted: a machine that is slow for a
minute is slow for both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.race.contestant import CONTINUOUS, GENERATE, LLAMA
from bench.race.laps import Sample

BITSANDBYTES = "int8-bitsandbytes"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a ratio: whose figure, and of which batch."""

    contestant: str
    batch: int


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio and its bound.

    Attributes:
        figure: The name of what is compared.
        over: Above the line.
        under: Below the line.
        bound: The ratio's bound.
        at_least: Whether the bound is the least; else it is the most.
    """

    figure: str
    over: Side
    under: Side
    bound: float
    at_least: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What a goal came to; `ratio` is None where a side was not measured."""

    text: str
    ratio: float | None
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        if self.ratio is None:
            return False
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def goals_of(own: str, batches: Sequence[int]) -> list[Goal]:
    """The goals for one of the engine's modes."""
    speed = "decode tokens/s"
    found = [
        Goal(speed, Side(own, batch), Side(peer, batch), bound)
        for peer, batch, bound in (
            (GENERATE, 1, 2.3),
            (CONTINUOUS, 32, 2.5),
            (CONTINUOUS, 64, 3.5),
            (LLAMA, 1, 0.6),
            (LLAMA, 8, 1.3),
            (LLAMA, 32, 1.5),
            (LLAMA, 64, 1.5),
        )
    ]
    found += [Goal(speed, Side(own, batch), Side(BITSANDBYTES, batch), 2.5) for batch in batches]
    found += [Goal(speed, Side(own, batch), Side("bf16", batch), 1.0) for batch in batches if own != "bf16"]
    latency = "latency"
    found += [
        Goal(latency, Side(own, batch), Side(GENERATE, 1), bound, at_least=False)
        for batch, bound in ((4, 1.2), (8, 1.6))
    ]
    return [*found, Goal("peak memory", Side(own, 8), Side(own, 1), 1.15, at_least=False)]


def judge(goal: Goal, samples: Sequence[Sample]) -> Finding:
    """What a goal came to."""
    over, under = _by_lap(goal.over, goal.figure, samples), _by_lap(goal.under, goal.figure, samples)
    ratios = [over[lap] / under[lap] for lap in sorted(over.keys() & under.keys()) if under[lap]]
    text = f"{goal.figure}: {_name(goal.over)} to {_name(goal.under)}"
    ratio = statistics.median(ratios) if ratios else None
    return Finding(text, ratio, goal.bound, goal.at_least)


def _by_lap(side: Side, figure: str, samples: Sequence[Sample]) -> dict[int, float]:
    mine = [one for one in samples if (one.contestant, one.batch) == (side.contestant, side.batch)]
    if figure == "peak memory":
        # Later laps begin with what larger batches left behind.
        return {one.lap: float(one.memory.peak_bytes) for one in mine if one.lap == 0}
    if figure == "latency":
        return {one.lap: one.figures.latency_s for one in mine}
    rates = {one.lap: one.figures.decode_tokens_per_s for one in mine}
    return {lap: rate for lap, rate in rates.items() if rate == rate}  # noqa: PLR0124 - leaves NaN out


def _name(side: Side) -> str:
    return f"{side.contestant} at {side.batch}"
