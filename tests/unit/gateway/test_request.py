"""The life of a request, as a table."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import (
    ArgumentInvalid,
    DeadlineExceeded,
    QueueFull,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
)
from services.gateway.core import request_events
from services.gateway.core.attempts import RefusalReason
from services.gateway.core.jobs import Grant, Outcome
from services.gateway.core.request import TABLE, TERMINAL, IllegalEvent, Phase, Request, step

KINDS = (
    request_events.Granted,
    request_events.Forgotten,
    request_events.Rejected,
    request_events.Progressed,
    request_events.Completed,
    request_events.StopReached,
    request_events.Refused,
    request_events.AttemptLost,
    request_events.LeaseLost,
    request_events.Withdrawn,
    request_events.DeadlinePassed,
    request_events.WaitedOut,
)
RETURNS_SLOT = (request_events.Settle, request_events.Requeue, request_events.Decline)


def grant(nonce: str = "n1", *, worker_id: str = "w1", revision: str = "r1") -> Grant:
    """A grant with plain values."""
    return Grant("job", 1, nonce, worker_id, "127.0.0.1:1", revision, 1)


def running() -> Request:
    """A request that has emitted some tokens."""
    request, _ = step(Request(), request_events.Granted(grant()))
    return step(request, request_events.Progressed())[0]


EVENTS = st.one_of(
    st.integers(0, 10**6).map(
        lambda number: request_events.Granted(grant(f"n{number}", revision=f"r{number % 3}"))
    ),
    st.just(request_events.Forgotten()),
    st.sampled_from([QueueFull("full"), StoreUnavailable("gone")]).map(request_events.Rejected),
    st.just(request_events.Progressed()),
    st.just(request_events.Completed()),
    st.just(request_events.StopReached()),
    st.sampled_from(list(RefusalReason)).map(request_events.Refused),
    st.just(request_events.AttemptLost(crashed=True)),
    st.just(request_events.LeaseLost()),
    st.just(request_events.Withdrawn(RequestCancelled("bye"))),
    st.just(request_events.DeadlinePassed()),
    st.just(request_events.WaitedOut()),
)


@given(st.lists(EVENTS, max_size=30), st.integers(1, 4))
def test_whatever_happens_a_request_ends_once_and_returns_its_slot(
    events: list[request_events.RequestEvent], attempts_max: int
) -> None:
    """One Close at most, every grant given back exactly once, and illegal events change nothing."""
    request, lent = Request(attempts_max=attempts_max), 0
    effects: list[request_events.Effect] = []
    for event in events:
        before = request
        try:
            request, done = step(request, event)
        except IllegalEvent:
            assert request is before
            continue
        effects.extend(done)
        # A lease that the queue took away needs no return.
        taken = isinstance(event, request_events.LeaseLost) and before.grant is not None
        lent += isinstance(event, request_events.Granted) - taken
        assert before.phase not in TERMINAL
        assert request.emitted >= before.emitted
    returned = sum(isinstance(effect, RETURNS_SLOT) for effect in effects)
    closes = [effect for effect in effects if isinstance(effect, request_events.Close)]
    assert len(closes) == (request.phase in TERMINAL)
    assert lent - returned == (request.grant is not None)
    assert request.failures <= attempts_max


@pytest.mark.parametrize(("phase", "kind"), list(itertools.product(TERMINAL, KINDS)))
def test_nothing_leaves_a_terminal_phase(phase: Phase, kind: type) -> None:
    """The table has no entry for any event after the end."""
    assert (phase, kind) not in TABLE


def test_every_living_phase_can_be_ended_by_client_and_clock() -> None:
    """Cancellation and deadline are legal wherever a request lives."""
    for phase in set(Phase) - TERMINAL:
        assert (phase, request_events.Withdrawn) in TABLE
        assert (phase, request_events.DeadlinePassed) in TABLE


def test_an_illegal_event_raises() -> None:
    """Tokens of a request that waits are a defect."""
    with pytest.raises(IllegalEvent, match="Progressed in queued"):
        step(Request(), request_events.Progressed())


def test_a_success_settles_and_closes() -> None:
    """The slot goes back as finished, and the client is told of no error."""
    request, effects = step(running(), request_events.Completed())
    assert request.phase is Phase.FINISHED
    assert effects == (request_events.Settle(grant(), Outcome.FINISHED), request_events.Close(None))


def test_a_stop_string_also_ends_the_worker() -> None:
    """The worker cannot know of it, so it is cancelled first."""
    _, effects = step(running(), request_events.StopReached())
    assert effects[0] == request_events.CancelAttempt()


def test_a_lost_worker_means_another_place_in_the_queue() -> None:
    """The job is pinned to its revision once it has emitted, and the wait for another worker is bounded."""
    request, effects = step(running(), request_events.AttemptLost(crashed=True))
    assert (request.phase, request.failures) == (Phase.QUEUED, 1)
    assert effects == (request_events.Requeue(grant(), emitted=True), request_events.AwaitWorker())
    early, _ = step(Request(), request_events.Granted(grant()))
    _, effects = step(early, request_events.AttemptLost(crashed=True))
    assert effects[0] == request_events.Requeue(grant(), emitted=False)


def test_another_revision_never_continues_a_text() -> None:
    """One response, one revision: the request ends rather than mix two."""
    waiting, _ = step(running(), request_events.AttemptLost(crashed=True))
    request, effects = step(waiting, request_events.Granted(grant("n2", revision="r2")))
    assert request.phase is Phase.FAILED
    assert effects[0] == request_events.Settle(grant("n2", revision="r2"), Outcome.FAILED)


def test_before_the_first_token_any_revision_will_do() -> None:
    """Nothing was said yet, so nothing can be mixed."""
    request, _ = step(Request(), request_events.Granted(grant()))
    waiting, _ = step(request, request_events.AttemptLost(crashed=True))
    granted, _ = step(waiting, request_events.Granted(grant("n2", revision="r2")))
    assert (granted.phase, granted.revision, granted.starts) == (Phase.GRANTED, "r2", 2)


def test_a_refusal_costs_no_attempt() -> None:
    """The worker is held for a moment, and the job waits again."""
    granted, _ = step(Request(), request_events.Granted(grant()))
    request, effects = step(granted, request_events.Refused(RefusalReason.BUSY))
    assert (request.phase, request.failures, request.starts) == (Phase.QUEUED, 0, 1)
    assert effects == (request_events.Decline(grant(), 0.1),)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_request_that_is_to_blame_ends_and_nobody_else_is_asked(tokens: int) -> None:
    """A format may turn out to be too much after tokens: it is no loss, and costs no worker anything."""
    begun = running() if tokens else step(Request(), request_events.Granted(grant()))[0]
    request, effects = step(begun, request_events.Refused(RefusalReason.INVALID, "format.regex: why"))
    assert (request.phase, request.failures) == (Phase.FAILED, 0)
    settle, close = effects
    assert settle == request_events.Settle(grant(), Outcome.FAILED)
    assert isinstance(close, request_events.Close)
    assert isinstance(close.error, ArgumentInvalid)
    assert str(close.error) == "format.regex: why"


def test_any_other_refusal_of_what_was_begun_is_a_loss() -> None:
    """The worker broke the protocol; another one goes on."""
    request, effects = step(running(), request_events.Refused(RefusalReason.BUSY))
    assert (request.phase, request.failures) == (Phase.QUEUED, 1)
    assert effects[0] == request_events.Requeue(grant(), emitted=True)


def test_silence_is_not_blamed_on_a_request() -> None:
    """A busy machine's workers fall silent one after the other; that says nothing about who waits on them."""
    granted, _ = step(Request(), request_events.Granted(grant()))
    once, _ = step(granted, request_events.AttemptLost(crashed=False))
    again, _ = step(once, request_events.Granted(grant("n2")))
    twice, _ = step(again, request_events.AttemptLost(crashed=False))
    assert (twice.phase, twice.failures, twice.blames) == (Phase.QUEUED, 2, 0)


def lose_and_meet(*happens: RefusalReason | None) -> Request:
    """A request whose worker was lost, after refusals, and ends of the time of waiting (None)."""
    request, _ = step(running(), request_events.AttemptLost(crashed=True))
    for number, reason in enumerate(happens):
        if reason is None:
            request, effects = step(request, request_events.WaitedOut())
            assert effects == (request_events.AwaitWorker(),)
        else:
            request, _ = step(request, request_events.Granted(grant(f"later{number}")))
            request, effects = step(request, request_events.Refused(reason))
            assert request.phase is Phase.QUEUED or isinstance(effects[-1], request_events.Close)
    return request


def test_a_request_waits_on_in_a_line_that_is_longer_than_the_wait_for_a_worker() -> None:
    """Whether anybody holds its revision is the queue's to say: others may be busy with long answers."""
    request = lose_and_meet(None, None, RefusalReason.BUSY, None, RefusalReason.BUSY)
    assert request.phase is Phase.QUEUED


@pytest.mark.parametrize("reason", [RefusalReason.UNREACHABLE, RefusalReason.REVISION_NOT_READY])
def test_a_worker_that_is_listed_and_not_there_is_no_worker(reason: RefusalReason) -> None:
    """Before and after the wait was over it was lent to the request in vain: the request ends."""
    assert lose_and_meet(reason, reason, None).phase is Phase.QUEUED
    assert lose_and_meet(reason, None, reason).phase is Phase.FAILED


def test_a_second_worker_that_dies_while_a_request_waits_in_line_does_not_end_it() -> None:
    """The first one was struck off long ago, and a third may have a slot soon."""
    away = RefusalReason.UNREACHABLE
    request = lose_and_meet(away, None, None, away)
    assert request.phase is Phase.QUEUED
    again = step(request, request_events.Granted(grant("again")))[0]
    lost, _ = step(again, request_events.AttemptLost(crashed=False))
    assert (lost.missed, lost.waited_out) == (False, False)


def test_the_wait_is_over_while_the_absent_worker_is_asked_once_more() -> None:
    """What it answers then ends the request, and says that nobody could go on."""
    waiting = lose_and_meet(RefusalReason.UNREACHABLE)
    granted, _ = step(waiting, request_events.Granted(grant("last")))
    granted, _ = step(granted, request_events.WaitedOut())
    request, effects = step(granted, request_events.Refused(RefusalReason.UNREACHABLE))
    assert request.phase is Phase.FAILED
    assert isinstance(effects[-1], request_events.Close)
    assert isinstance(effects[-1].error, WorkerLost)


def test_the_deadline_says_where_it_passed() -> None:
    """A client can tell a long queue from a long answer."""
    _, effects = step(Request(), request_events.DeadlinePassed())
    assert effects[0] == request_events.Withdraw()
    assert isinstance(effects[1], request_events.Close)
    assert isinstance(effects[1].error, DeadlineExceeded)
    assert "queue" in str(effects[1].error)
