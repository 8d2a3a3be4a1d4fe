"""How long workers are asked to hold tokens back."""

from __future__ import annotations

from services.gateway.core.pace import Pace


def test_a_hold_grows_with_the_streams_up_to_its_most() -> None:
    """So many streams, so many events a second together; few streams hear of every token."""
    pace = Pace(400.0)
    assert not pace.follow(0)
    assert not pace.follow(1)
    assert pace.hold_ms == 0
    assert pace.follow(7)
    assert pace.hold_ms == 20
    assert pace.follow(28)
    assert pace.hold_ms == 90
    assert pace.follow(28)
    assert pace.hold_ms == 160
    assert not pace.follow(1_000)
    assert pace.follow(-1_064)
    assert pace.hold_ms == 0


def test_a_hold_that_hardly_differs_is_not_asked_for() -> None:
    """Streams come and go all the time."""
    pace = Pace(400.0)
    assert pace.follow(16)
    assert not pace.follow(1)
    assert not pace.follow(-3)
    assert pace.hold_ms == 40
    assert pace.follow(6)
    assert pace.follow(-6)
    assert pace.hold_ms == 35


def test_without_a_bound_nothing_is_held_back() -> None:
    """However many run."""
    pace = Pace(0.0)
    assert not pace.follow(1_000)
    assert pace.hold_ms == 0
