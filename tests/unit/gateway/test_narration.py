"""What a client is told of its place: steps near the front, what matters far behind it."""

from __future__ import annotations

from itertools import pairwise

from services.gateway.core.events import Queued
from services.gateway.core.jobs import Waiting
from services.gateway.dispatcher.narration import FRONT_PLACES, PLACE_PAUSE_S, PLACE_STEP, Narration
from services.gateway.dispatcher.outbox import Outbox
from tests.fakes.gateway_ports import FakeMeter
from tests.fakes.turned_clock import TurnedClock
from tests.fixtures.dispatcher_world import job


def told(positions: list[int], step_s: float) -> list[int]:
    """Those of the places, one every `step_s`, of which the client hears."""
    clock, outbox = TurnedClock(), Outbox(8)
    narration = Narration(job(), outbox, clock, FakeMeter())
    heard = []
    for position in positions:
        narration.place(Waiting(position))
        if len(outbox):
            event = outbox.take()
            assert isinstance(event, Queued)
            heard.append(event.position)
        clock.turn(step_s)
    return heard


def test_the_front_hears_of_every_step() -> None:
    """Whichever way it goes."""
    places = [FRONT_PLACES, 3, 2, 2, 3, 1, 0]
    assert told(places, 1.0) == [FRONT_PLACES, 3, 2, 3, 1, 0]


def test_far_behind_small_steps_are_not_told() -> None:
    """What is told is never a fifth off, and a few of hundreds of steps are told."""
    places = list(range(400, FRONT_PLACES, -1))
    heard = told(places, 0.01)
    assert heard[0] == 400
    assert all(later <= earlier * (1 - PLACE_STEP) for earlier, later in pairwise(heard))
    assert heard[-1] <= (FRONT_PLACES + 1) / (1 - PLACE_STEP)
    assert len(heard) < 25
    assert told([100, 110, 121, 119], 0.01) == [100, 121]


def test_after_a_while_any_other_place_is_told() -> None:
    """And the same one is not."""
    assert told([100, 99, 98, 98], PLACE_PAUSE_S) == [100, 99, 98]
