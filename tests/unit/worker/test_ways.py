"""The faster way is taken, whatever it is, and found again when it changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest

from services.worker.core.ways import FIRST_PAIRS, NEXT_PAIR, NEXT_PAIR_MAX, PAIRS, Ways

UNITS = 4.0
Seconds = Callable[[int], float]


def work(ways: Ways, times: int, seconds: tuple[float, float] | Seconds) -> list[int]:
    """Does so many pieces of work that take a known time each way; returns the ways that were taken."""
    taken: list[int] = []
    for _ in range(times):
        way = ways.choose()
        ways.note(way, UNITS, seconds[way] if isinstance(seconds, tuple) else seconds(way))
        taken.append(way)
    return taken


@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_both_ways_are_tried_and_the_faster_one_taken(seconds: tuple[float, float]) -> None:
    """A few pairs first; then the faster one alone, until the next pair."""
    taken = work(Ways(), 2 * FIRST_PAIRS + NEXT_PAIR, seconds)
    faster = seconds.index(1.0)
    assert taken[: 2 * FIRST_PAIRS] == [0, 1] * FIRST_PAIRS
    assert set(taken[2 * FIRST_PAIRS :]) == {faster}


def test_a_way_that_is_much_slower_is_tried_less_and_less() -> None:
    """Each pause is twice as long as the one before, up to a bound."""
    taken = work(Ways(), 8 * NEXT_PAIR_MAX, (1.0, 2.0))[2 * FIRST_PAIRS :]
    tries = [index for index, way in enumerate(taken) if way == 1]
    pauses = [after - before - 1 for before, after in itertools.pairwise(tries)]
    assert pauses == [4 * NEXT_PAIR, 8 * NEXT_PAIR, *[NEXT_PAIR_MAX] * (len(pauses) - 2)]
    assert len(pauses) > 5


def test_a_way_that_is_hardly_slower_is_tried_as_often() -> None:
    """Tomorrow it may be the faster one, and trying it costs little."""
    taken = work(Ways(), 20 * NEXT_PAIR, (1.0, 1.1))[2 * FIRST_PAIRS :]
    tries = [index for index, way in enumerate(taken) if way == 1]
    assert {after - before - 1 for before, after in itertools.pairwise(tries)} == {NEXT_PAIR}


def test_the_faster_way_is_found_again_when_it_changes() -> None:
    """A machine that others begin to use: what took a second takes three."""
    ways = Ways()
    work(ways, 400, (1.0, 1.2))
    assert ways.best == 0
    work(ways, (PAIRS + 1) * (NEXT_PAIR + 1), (3.0, 1.3))
    assert ways.best == 1


def test_a_slow_first_time_is_forgotten() -> None:
    """Weights that are read from a file for the first time take ten times as long: not the way's doing."""
    ways = Ways()
    ways.note(0, UNITS, 30.0)
    work(ways, 3 * FIRST_PAIRS, (1.0, 2.0))
    assert ways.best == 0


def test_what_counts_is_the_time_of_a_unit() -> None:
    """Twice the work in twice the time is no slower."""
    ways = Ways()
    for _ in range(FIRST_PAIRS):
        ways.note(0, 1.0, 1.0)
        ways.note(1, 4.0, 2.0)
    assert ways.best == 1


@pytest.mark.parametrize("slower", [1.15, 1.3, 1.6])
def test_neither_drift_nor_mishaps_change_the_choice(slower: float) -> None:
    """A machine whose speed drifts by half, and one piece of fifty that takes five times as long."""
    chance = Random(1)  # noqa: S311 - it draws mishaps
    ways, drift, taken = Ways(), 1.0, [0, 0]

    def took_s(way: int) -> float:
        mishap = 5.0 if chance.random() < 0.02 else 1.0
        return (1.0, slower)[way] * drift * chance.gauss(1.0, 0.1) * mishap

    for _ in range(200):
        for way in work(ways, 100, took_s):
            taken[way] += 1
        drift = min(2.0, max(1.0, drift * chance.choice([0.7, 1.0, 1.4])))
    assert taken[1] < 0.08 * sum(taken)


@pytest.mark.parametrize("way", [0, 1])
def test_a_way_that_fails_is_left_for_a_while(way: int) -> None:
    """Also the one that was the faster."""
    ways = Ways()
    work(ways, 20, (1.0, 1.0))
    ways.fail(way)
    assert set(work(ways, NEXT_PAIR_MAX, (1.0, 1.0))) == {1 - way}
    assert ways.choose() == way
