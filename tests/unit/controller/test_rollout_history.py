"""Which records of rollouts are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.controller.core import rollout_history
from services.controller.core.rollout_history import worth_keeping
from services.controller.core.rollout_record import Rollout, Spec, State, create


def ended(rollout_id: str, at_ms: int, old: str, new: str, state: State) -> Rollout:
    """A rollout from one revision to another; all begin with the revision of one start."""
    return replace(create(rollout_id, Spec(model="m", revision=new), old, at_ms, "a"), state=state)


def test_what_served_and_what_serves_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back to what has served is open however many rollouts there were since; so is one under way."""
    monkeypatch.setattr(rollout_history, "HISTORY_MAX", 1)
    found = [
        ended("first", 1, "a", "b", State.COMPLETED),
        ended("second", 2, "b", "a", State.COMPLETED),
        ended("again", 3, "a", "b", State.COMPLETED),
        ended("last", 4, "b", "c", State.COMPLETED),
        ended("open", 5, "c", "d", State.BAKING),
        *(ended(f"aborted {number}", 6 + number, "c", "d", State.ABORTED) for number in range(3)),
    ]
    assert worth_keeping(found) == {"again", "last", "open", "aborted 2"}
