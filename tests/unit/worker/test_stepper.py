"""The stepper: when a turn would do anything, and how a revision leaves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.common.system_clock import SystemClock
from services.worker.core.admission import JobStart
from services.worker.core.batch import Batch, Choice
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
from tests.fakes.turned_clock import TurnedClock
from tests.fakes.worker_ports import FakeRunner

KEY = SequenceKey(1, "a")
ENDS = [Cancel(KEY), CloseSession(1)]


class SlowRunner(FakeRunner):
    """Takes its time for each step."""

    def __init__(self, clock: TurnedClock, step_s: float) -> None:
        super().__init__()
        self._clock, self._takes_s = clock, step_s

    def step(self, batch: Batch) -> Sequence[Choice]:
        """See `ModelRunner.step`."""
        self._clock.turn(self._takes_s)
        return super().step(batch)


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


def test_what_steps_take_is_counted_with_those_that_fail() -> None:
    """Two steps of a quarter of a second each, the second of which raises."""
    clock = TurnedClock()
    runner = SlowRunner(clock, 0.25)
    stepper = Stepper(2, clock, chunk_tokens=64, shared_chunk_tokens=16, prefix_cache_share=0.0)
    stepper.handle(Host("r", runner))
    stepper.handle(Admit(JobStart("m", "r", 5, (SequenceStart(KEY, (3, 1, 4), 8, credit_tokens=8),))))
    stepper.step()
    runner.error = RuntimeError("broken")
    stepper.step()
    assert (stepper.pulse.steps, stepper.pulse.step_s) == (2, 0.5)
