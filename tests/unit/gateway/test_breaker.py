"""The breaker's table, vector by vector, on a clock that the test turns."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from services.gateway.core.breaker import (
    FORCED,
    TABLE,
    BreakerLimits,
    Permit,
    State,
    Verdict,
    admit,
    closed_by_hand,
    force,
    new_breaker,
    opened_by_hand,
    renewed,
    settle,
    verdict_of,
)
from services.gateway.core.retry import BACKOFF_LAST_S, RetryBudget, backoff_s

LIMITS = BreakerLimits()


@dataclass
class Run:
    """A breaker under a script of words.

    `S` `F` `N`: a call that succeeds, fails or is neutral; `+T`: T seconds pass; `call`: a call begins and
    stays under way; `S!` `F!` `N!`: the oldest call under way ends; `open` `closed` `release`: an
    operator's hold; `process`: the target is a new process. `x` before a word: that many times.
    """

    now_s: float = 1_000.0
    refused: int = 0
    pending: list[Permit] = field(default_factory=list)
    limits: BreakerLimits = LIMITS

    def __post_init__(self) -> None:
        self.breaker = new_breaker(self.limits, self.now_s)

    def play(self, script: str) -> None:
        """Plays all words."""
        for word in script.split():
            times, _, plain = word.rpartition("x")
            for _ in range(int(times or 1)):
                self._play(plain)

    def _play(self, word: str) -> None:
        hold = {"open": State.FORCED_OPEN, "closed": State.FORCED_CLOSED, "release": State.CLOSED}
        if word.startswith("+"):
            self.now_s += float(word[1:])
        elif word in hold:
            self.breaker = force(self.breaker, hold[word], self.now_s)
        elif word == "process":
            self.breaker = renewed(self.breaker, self.now_s)
        elif word == "call":
            self._begin()
        elif word.endswith("!"):
            self._end(self.pending.pop(0), word[0])
        elif self._begin():
            self._end(self.pending.pop(), word)

    def _begin(self) -> bool:
        self.breaker, permit = admit(self.breaker, self.now_s)
        if permit is None:
            self.refused += 1
            return False
        self.pending.append(permit)
        return True

    def _end(self, permit: Permit, letter: str) -> None:
        verdict = {"S": Verdict.SUCCESS, "F": Verdict.FAILURE, "N": Verdict.NEUTRAL}[letter]
        self.breaker = settle(self.breaker, permit, verdict, self.now_s)


@pytest.mark.parametrize(
    ("script", "state", "refused"),
    [
        pytest.param("", State.CLOSED, 0, id="begins-closed"),
        pytest.param("1000xS", State.CLOSED, 0, id="successes-keep-it-closed"),
        pytest.param("19xF", State.CLOSED, 0, id="nineteen-calls-say-nothing"),
        pytest.param("20xF", State.OPEN, 0, id="twenty-failures-open-it"),
        pytest.param("10xS 10xF", State.OPEN, 0, id="half-of-twenty-opens-it"),
        pytest.param("11xS 9xF", State.CLOSED, 0, id="forty-five-percent-do-not"),
        pytest.param("51xS 50xF", State.CLOSED, 0, id="forty-nine-and-a-half-are-forty-nine"),
        pytest.param("50xS 50xF", State.OPEN, 0, id="exactly-fifty-percent-of-hundred"),
        pytest.param("15xF 4xS S", State.OPEN, 0, id="a-success-that-completes-the-volume-opens-it"),
        pytest.param("10xF +10.1 10xF", State.CLOSED, 0, id="what-is-older-than-the-window-does-not-count"),
        pytest.param("10xF +8.9 10xF", State.OPEN, 0, id="what-is-within-the-window-counts"),
        pytest.param("5xF +3 5xF +3 5xF +3 5xF", State.OPEN, 0, id="buckets-add-up"),
        pytest.param("1000xN", State.CLOSED, 0, id="neutral-outcomes-do-not-open-it"),
        pytest.param("19xF 100xN", State.CLOSED, 0, id="neutral-outcomes-are-no-volume"),
        pytest.param("10xF 100xN 10xS", State.OPEN, 0, id="neutral-outcomes-do-not-dilute"),
        pytest.param("20xF 7xS", State.OPEN, 7, id="open-refuses-all"),
        pytest.param("20xF +4.9 S", State.OPEN, 1, id="no-trial-before-the-sleep-is-over"),
        pytest.param("20xF +5 call", State.HALF_OPEN, 0, id="a-trial-after-the-sleep"),
        pytest.param("20xF +5", State.OPEN, 0, id="the-sleep-alone-changes-nothing"),
        pytest.param("20xF +5 call 20xS", State.HALF_OPEN, 20, id="one-trial-alone"),
        pytest.param("20xF +5 call +60 S", State.HALF_OPEN, 1, id="a-slow-trial-stays-the-only-one"),
        pytest.param("20xF +5 S", State.CLOSED, 0, id="a-good-trial-closes-it"),
        pytest.param("20xF +5 S 19xF", State.CLOSED, 0, id="closing-clears-the-window"),
        pytest.param("20xF +5 S 20xF", State.OPEN, 0, id="it-opens-again-by-the-same-rule"),
        pytest.param("20xF +5 F", State.OPEN, 0, id="a-bad-trial-opens-it"),
        pytest.param("20xF +5 F +4.9 S", State.OPEN, 1, id="a-bad-trial-restarts-the-sleep"),
        pytest.param("20xF +5 F +5 S", State.CLOSED, 0, id="the-second-trial-may-close-it"),
        pytest.param("20xF +5 N", State.OPEN, 0, id="a-neutral-trial-opens-it"),
        pytest.param("call 20xF S!", State.OPEN, 0, id="a-late-success-closes-nothing"),
        pytest.param("call 20xF +5 call S!", State.HALF_OPEN, 0, id="a-late-success-is-not-the-trial's"),
        pytest.param("call 20xF +5 call F!", State.HALF_OPEN, 0, id="a-late-failure-is-not-the-trial's"),
        pytest.param(
            "20xcall 20xF +5 S 20xF!", State.CLOSED, 0, id="late-failures-open-nothing-after-recovery"
        ),
        pytest.param("20xcall 19xF! F!", State.OPEN, 0, id="calls-under-way-together-open-it"),
        pytest.param("open S", State.FORCED_OPEN, 1, id="forced-open-refuses"),
        pytest.param("open +3600 S", State.FORCED_OPEN, 1, id="forced-open-tries-nothing"),
        pytest.param("call open S!", State.FORCED_OPEN, 0, id="forced-open-hears-no-late-success"),
        pytest.param("closed 1000xF", State.FORCED_CLOSED, 0, id="forced-closed-never-opens"),
        pytest.param("20xF closed S", State.FORCED_CLOSED, 0, id="forced-closed-ends-a-sleep"),
        pytest.param("closed 30xF release F", State.CLOSED, 0, id="a-release-begins-with-an-empty-window"),
        pytest.param("open release S", State.CLOSED, 0, id="a-release-closes-it"),
        pytest.param("20xF release S", State.OPEN, 1, id="a-release-without-a-hold-changes-nothing"),
        pytest.param("20xF +5 call open S!", State.FORCED_OPEN, 0, id="a-hold-outlasts-the-trial"),
        pytest.param("open closed", State.FORCED_CLOSED, 0, id="one-hold-replaces-the-other"),
        pytest.param("20xF process S", State.CLOSED, 0, id="a-new-process-starts-closed"),
        pytest.param("19xF process F", State.CLOSED, 0, id="a-new-process-has-an-empty-window"),
        pytest.param(
            "20xcall process 20xF!", State.CLOSED, 0, id="the-old-process-is-not-held-against-the-new"
        ),
        pytest.param("open process", State.FORCED_OPEN, 0, id="a-hold-outlasts-the-process"),
        pytest.param("20xF +5 call process S!", State.CLOSED, 0, id="a-new-process-ends-the-trial"),
    ],
)
def test_vector(script: str, state: State, refused: int) -> None:
    """Calls, time and holds lead to the state that the table says, and so many calls are refused."""
    run = Run()
    run.play(script)
    assert (run.breaker.state, run.refused) == (state, refused)


def test_failures_in_a_row_open_it_where_that_is_asked_for() -> None:
    """Two in a row among a thousand successes are enough for a limit of two; a success begins anew."""
    run = Run(limits=BreakerLimits(row_max=2))
    states = []
    for words in ("1000xS F S F", "F", "+5 S F"):
        run.play(words)
        states.append(run.breaker.state)
    assert states == [State.CLOSED, State.OPEN, State.CLOSED]


def test_every_outcome_that_can_be_has_a_row() -> None:
    """States that admit calls have a row for each verdict; states that admit none have none."""
    admitting = {State.CLOSED, State.HALF_OPEN, State.FORCED_CLOSED}
    assert {(state, verdict) for state in admitting for verdict in Verdict} == set(TABLE)


def test_the_sleep_that_is_left_is_told() -> None:
    """A client is told how long the breaker sleeps; a closed one and a held one do not."""
    run = Run()
    run.play("20xF +2")
    assert run.breaker.sleep_left_s(run.now_s) == pytest.approx(3.0)
    assert force(run.breaker, State.FORCED_OPEN, run.now_s).sleep_left_s(run.now_s) == 0
    assert closed_by_hand(run.breaker, run.now_s).sleep_left_s(run.now_s) == 0
    assert opened_by_hand(run.breaker, run.now_s).sleep_left_s(run.now_s) == 5
    assert State.CLOSED not in FORCED


@pytest.mark.parametrize(
    ("code", "own_timer", "verdict"),
    [
        ("OK", False, Verdict.SUCCESS),
        *((code, False, Verdict.FAILURE) for code in ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS")),
        ("DEADLINE_EXCEEDED", True, Verdict.FAILURE),
        ("DEADLINE_EXCEEDED", False, Verdict.NEUTRAL),
        *(
            (code, True, Verdict.NEUTRAL)
            for code in (
                "CANCELLED",
                "RESOURCE_EXHAUSTED",
                "ABORTED",
                "INVALID_ARGUMENT",
                "NOT_FOUND",
                "ALREADY_EXISTS",
                "FAILED_PRECONDITION",
                "PERMISSION_DENIED",
                "UNAUTHENTICATED",
                "OUT_OF_RANGE",
                "UNIMPLEMENTED",
            )
        ),
    ],
)
def test_a_status_says_whether_its_target_is_ill(code: str, own_timer: bool, verdict: Verdict) -> None:  # noqa: FBT001 - a parameter of the table
    """Only what the target does wrong counts; a client's mistake, a cancellation and back-pressure never."""
    assert verdict_of(code, own_timer=own_timer) is verdict


def test_a_death_costs_one_token_whatever_it_carried() -> None:
    """Ten deaths are made good, sixteen requests each; the eleventh is not, until successes paid for it."""
    budget = RetryBudget()
    for death in range(10):
        assert all(budget.spend(f"w{death}", 100.0 * death) for _ in range(16))
    assert not budget.spend("w1", 5_000.0)
    for _ in range(9):
        budget.earn()
    assert not budget.spend("w1", 5_000.0)
    budget.earn()
    budget.earn()
    assert budget.spend("w1", 5_000.0)
    assert budget.spend("w1", 5_000.5)
    assert not budget.spend("w1", 5_001.5)


def test_successes_do_not_pile_up() -> None:
    """A long quiet time buys no more than ten deaths."""
    budget = RetryBudget()
    for _ in range(1_000):
        budget.earn()
    assert budget.tokens == 10


def test_backoff_grows_is_bounded_and_differs() -> None:
    """Each loss may wait twice as long as the one before, never longer than the bound; nonces spread it."""
    waits = [[backoff_s(failures, f"n{n}") for n in range(200)] for failures in range(1, 12)]
    assert max(waits[0]) <= 0.05 < max(waits[1]) <= 0.1
    assert max(map(max, waits)) <= BACKOFF_LAST_S
    assert len(set(waits[0])) > 100
