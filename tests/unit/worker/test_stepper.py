"""The stepper: when a turn would do anything, and how a revision leaves."""

from __future__ import annotations

import pytest

from services.common.system_clock import SystemClock
from services.worker.core.admission import JobStart
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart
from services.worker.core.stepper import (
    AddCredit,
    Admit,
    Cancel,
    CloseSession,
    Command,
    Event,
    Host,
    Stepper,
    Unload,
    Unloaded,
)
from tests.fakes.worker_ports import FakeRunner

KEY = SequenceKey(1, "a")
ENDS = [Cancel(KEY), CloseSession(1)]


def paused() -> Stepper:
    """A revision that shall go, with one sequence that waits for credit."""
    stepper = Stepper(2, SystemClock(), chunk_tokens=64, shared_chunk_tokens=16, prefix_cache_share=0.0)
    start = SequenceStart(KEY, (3, 1, 4), 8, credit_tokens=0)
    for command in (Host("r", FakeRunner()), Admit(JobStart("m", "r", 5, (start,))), Unload("r")):
        assert stepper.handle(command) == ()
    return stepper


@pytest.mark.parametrize("end", ENDS)
def test_a_leaving_revision_whose_sequences_are_paused_has_no_work(end: Command) -> None:
    """Its client reads slowly, perhaps for minutes: the thread sleeps until the end comes, as a command."""
    stepper = paused()
    assert not stepper.has_work
    assert stepper.step() == ()
    stepper.handle(end)
    assert stepper.has_work
    assert stepper.step() == (Unloaded("r"),)
    assert not stepper.has_work


def test_a_leaving_revision_goes_on_with_credit_and_leaves_with_its_last_sequence() -> None:
    """Credit wakes it; the step that says the last token frees the revision."""
    stepper = paused()
    stepper.handle(AddCredit(KEY, 8))
    events: list[Event] = []
    while stepper.has_work:
        events.extend(stepper.step())
    assert events[-1] == Unloaded("r")
    assert [event.finish for event in events if isinstance(event, Output)] == [None] * 7 + [Finish.LENGTH]


def test_a_revision_that_runs_nothing_leaves_at_once() -> None:
    """There is work to do until it is gone."""
    stepper = Stepper(2, SystemClock(), chunk_tokens=64, shared_chunk_tokens=16, prefix_cache_share=0.0)
    stepper.handle(Host("r", FakeRunner()))
    assert not stepper.has_work
    stepper.handle(Unload("r"))
    assert stepper.has_work
    assert stepper.step() == (Unloaded("r"),)
