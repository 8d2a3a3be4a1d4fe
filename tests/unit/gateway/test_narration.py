"""What a client is told of its place: each step near the front, farther back now and then."""

from __future__ import annotations

from itertools import pairwise

from services.gateway.core.events import Queued
from services.gateway.core.jobs import Waiting
from services.gateway.dispatcher.narration import FRONT_PLACES, PLACE_PAUSE_S, Narration
from services.gateway.dispatcher.outbox import Outbox
from tests.fakes.gateway_ports import FakeMeter
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.dispatcher_world import job


def told(places: list[Waiting], step_s: float = 1.0) -> list[tuple[float, int]]:
    """When the client hears of which position, where the queue tells the places, one every `step_s`."""
    clock, outbox = TurnedClock(), Outbox(8)
    narration = Narration(job(), outbox, clock, FakeMeter())
    heard = []
    for number, place in enumerate(places):
        narration.place(place)
        if len(outbox):
            event = outbox.take()
            assert event == Queued(place.position, place.estimated_wait_s)
            heard.append((number * step_s, place.position))
        clock.turn(step_s)
    return heard


def test_the_front_hears_of_every_step() -> None:
    """Whichever way it goes, and however long a step takes."""
    positions = [FRONT_PLACES, 3, 2, 2, 3, 1, 0]
    heard = told([Waiting(position, 60.0) for position in positions])
    assert [position for _, position in heard] == [FRONT_PLACES, 3, 2, 3, 1, 0]


def test_a_place_holds_for_half_of_the_wait_that_was_told_with_it() -> None:
    """For five seconds at most, and at least until the next renewal."""
    assert told([Waiting(100 - n, 14.0) for n in range(11)]) == [(0, 100), (5, 95), (10, 90)]
    assert told([Waiting(100 - n, 6.0) for n in range(8)]) == [(0, 100), (3, 97), (6, 94)]
    assert told([Waiting(100 - n, 0.5) for n in range(4)]) == [(n, 100 - n) for n in range(4)]


def test_a_long_wait_takes_a_few_events() -> None:
    """The nearer the end, the closer they are."""
    heard = told([Waiting(28 * (14 - n), 14.0 - n) for n in range(15)])
    assert [at for at, _ in heard] == [0, 5, 10, 12, 13, 14]
    pauses = [later - earlier for (earlier, _), (later, _) in pairwise(heard)]
    assert pauses == sorted(pauses, reverse=True)
    assert max(pauses) <= PLACE_PAUSE_S


def test_a_jump_is_told_within_the_pause() -> None:
    """So is whoever is pushed back from the front, at once."""
    assert told([Waiting(100, 14.0), *[Waiting(300, 42.0)] * 5]) == [(0, 100), (5, 300)]
    assert told([Waiting(2, 1.0), Waiting(40, 20.0), Waiting(39, 20.0)]) == [(0, 2), (1, 40)]


def test_the_same_place_is_not_told_again() -> None:
    """It counts as told when it was looked for: the next look is as far away."""
    assert told([*[Waiting(100, 14.0)] * 6, *[Waiting(99, 14.0)] * 6]) == [(0, 100), (10, 99)]


def test_every_step_is_told_while_no_wait_is_known() -> None:
    """Nothing has finished yet: the first wait that is known reaches the client with the next step."""
    places = [Waiting(100), Waiting(100), Waiting(99), Waiting(98, 20.0), Waiting(97, 20.0)]
    assert told(places) == [(0, 100), (2, 99), (3, 98)]


def test_a_place_is_due_anew_after_a_grant() -> None:
    """Whoever waits again, as its worker was lost, hears where it stands at once."""
    outbox = Outbox(8)
    narration = Narration(job(), outbox, TurnedClock(), FakeMeter())
    assert narration.place_due
    narration.place(Waiting(100, 14.0))
    assert outbox.take() == Queued(100, 14.0)
    assert not narration.place_due
    narration.granted()
    assert narration.place_due
    narration.place(Waiting(100, 14.0))
    assert outbox.take() == Queued(100, 14.0)
