"""The faster way is taken, whatever it is, and found again when it changes."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from services.worker.core.ways import TRY_AGAIN, TRY_AGAIN_MAX, Ways

UNITS = 4.0


def work(ways: Ways, times: int, seconds: tuple[float, ...]) -> list[int]:
    """Does so many pieces of work that take a known time each way; returns the ways that were taken."""
    taken: list[int] = []
    for _ in range(times):
        way = ways.choose()
        ways.note(way, UNITS, seconds[way])
        taken.append(way)
    return taken


def test_each_way_is_tried_and_the_faster_one_taken() -> None:
    """From the third piece of work on."""
    assert work(Ways(2), 10, (2.0, 1.0)) == [0, *[1] * 9]
    assert work(Ways(2), 10, (1.0, 2.0)) == [0, 1, *[0] * 8]


def test_a_way_that_is_much_slower_is_tried_less_and_less() -> None:
    """Each pause is twice as long as the one before, up to a bound."""
    taken = work(Ways(2), 6 * TRY_AGAIN_MAX, (1.0, 2.0))
    tries = [index for index, way in enumerate(taken) if way == 1]
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert pauses[0] == 2 * TRY_AGAIN
    assert pauses[:4] == sorted(pauses[:4])
    assert set(pauses[5:]) == {TRY_AGAIN_MAX}


def test_a_way_that_is_hardly_slower_is_tried_as_often() -> None:
    """Tomorrow it may be the faster one, and trying it costs little."""
    taken = work(Ways(2), 20 * TRY_AGAIN, (1.0, 1.1))
    tries = [index for index, way in enumerate(taken) if way == 1]
    assert {after - before for before, after in itertools.pairwise(tries)} == {TRY_AGAIN}


def test_the_faster_way_is_found_again_when_it_changes() -> None:
    """A machine that others begin to use: what took a second takes three."""
    ways = Ways(2)
    work(ways, 100, (1.0, 1.2))
    assert work(ways, 2 * TRY_AGAIN, (3.0, 1.3))[-1] == 1


def test_one_slow_piece_of_work_changes_little() -> None:
    """It is a fourth of a mean; the next ones bring that back."""
    ways = Ways(2)
    work(ways, 20, (1.0, 1.5))
    ways.note(0, UNITS, 2.0)
    assert ways.choose() == 0


def test_what_counts_is_the_time_of_a_unit() -> None:
    """Twice the work in twice the time is no slower."""
    ways = Ways(2)
    ways.note(0, 1.0, 1.0)
    ways.note(1, 4.0, 2.0)
    assert ways.choose() == 1


def test_a_slow_first_time_is_forgotten() -> None:
    """Weights that are read from a file for the first time take ten times as long: not the way's doing."""
    ways = Ways(2)
    ways.note(0, UNITS, 30.0)
    assert work(ways, 8 * TRY_AGAIN, (1.0, 2.0))[-1] == 0


@pytest.mark.parametrize("slower", [1.15, 1.3, 1.6])
def test_what_befalls_a_thread_for_once_changes_no_choice(slower: float) -> None:
    """One step of a hundred takes five times as long, in whichever way: the slower one is hardly taken."""
    chance = Random(1)  # noqa: S311 - it draws mishaps
    ways, taken = Ways(2), [0, 0]
    for _ in range(20_000):
        way = ways.choose()
        taken[way] += 1
        mishap = 5.0 if chance.random() < 0.01 else 1.0
        ways.note(way, UNITS, (1.0, slower)[way] * chance.gauss(1.0, 0.05) * mishap)
    assert taken[1] < 0.08 * 20_000


def test_a_way_that_fails_is_left_for_a_while() -> None:
    """Also the one that was the faster, and one that has never been taken to its end."""
    ways = Ways(2)
    work(ways, 10, (2.0, 1.0))
    ways.fail(1)
    assert work(ways, TRY_AGAIN_MAX - 1, (2.0, 1.0)) == [0] * (TRY_AGAIN_MAX - 1)
    assert 1 in work(ways, 2, (2.0, 1.0))
    fresh = Ways(2)
    fresh.note(0, UNITS, 1.0)
    fresh.fail(1)
    assert fresh.choose() == 0
