"""Rounds of a load measurement. Owns: the order of their steps, and what the rounds say together; pure.

A machine's speed drifts by more than what is looked for. Each round holds every number of clients once, so
that slow drift meets all of them, in an order of its own, so that none of them always follows the same one.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Enough that the ends of an interval are steady to a tenth of a percent.
_RESAMPLES = 4_000
# The interval holds nine of ten resamples.
_TAIL = 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """What all rounds say of one number of clients.

    Attributes:
        clients: How many.
        median: The median over the rounds, of tokens/s or of whatever else was measured.
        deviation: The standard deviation over the rounds, of the same unit; 0 of a single round.
        share: The median of its ratio to the mean of its round, relative to the highest of these medians.
        interval: From where to where that share is in nine of ten resamples of the rounds (bootstrap).
    """

    clients: int
    median: float
    deviation: float
    share: float
    interval: tuple[float, float]


def order(clients: Sequence[int], rounds: int, chance: random.Random) -> list[int]:
    """The steps of all rounds, one after the other; a single round's as they are given."""
    if rounds == 1:
        return list(clients)
    return [size for _ in range(rounds) for size in chance.sample(clients, len(clients))]


def summaries(rounds: Sequence[dict[int, float]], chance: random.Random) -> list[Summary]:
    """What the rounds say, by clients.

    Args:
        rounds: What was measured by clients, of each round; all of the same clients.
        chance: Draws the resamples.
    """
    shares = _shares(rounds)
    resampled = [_shares(chance.choices(rounds, k=len(rounds))) for _ in range(_RESAMPLES)]
    cut = round(_RESAMPLES * _TAIL)
    found: list[Summary] = []
    for clients in sorted(shares):
        values = [one[clients] for one in rounds]
        ranked = sorted(one[clients] for one in resampled)
        found.append(
            Summary(
                clients,
                statistics.median(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                shares[clients],
                (ranked[cut], ranked[-1 - cut]),
            )
        )
    return found


def _shares(rounds: Sequence[dict[int, float]]) -> dict[int, float]:
    """Each number of clients is compared within its round, so that what slowed all of it does not count."""
    means = [statistics.fmean(one.values()) or 1.0 for one in rounds]
    medians = {
        clients: statistics.median(one[clients] / mean for one, mean in zip(rounds, means, strict=True))
        for clients in rounds[0]
    }
    highest = max(medians.values())
    return {clients: median / highest if highest else 1.0 for clients, median in medians.items()}
