"""The circuit breaker: one table.

Owns: whether a call may be made, and what its outcome changes. Must not know: what is called, which library
carries the state, or what time it is: seconds of a clock that never goes back are an argument.

    CLOSED -- enough calls, too many failed --> OPEN -- slept --> HALF_OPEN -- success --> CLOSED, cleared
                                                  ^--- anything else ---'
    FORCED_OPEN and FORCED_CLOSED are an operator's; only an operator ends them.

Every change of state begins a new era, and an outcome counts only in the era that its call was admitted in: a
late success from before the trip closes nothing, and a late failure from before the recovery opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from services.gateway.core.rolling_window import RollingWindow, Tally


class State(StrEnum):
    """Whether calls pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


FORCED = frozenset({State.FORCED_OPEN, State.FORCED_CLOSED})


class Verdict(StrEnum):
    """What a call says about its target. NEUTRAL: nothing."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


# What a target answers when it is ill. All else is back-pressure, a cancellation or the caller's mistake.
FAILURE_CODES = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS"})


def verdict_of(code: str, *, own_timer: bool = False) -> Verdict:
    """What a gRPC status says about the target that ended a call with it.

    Args:
        code: The status by its canonical name.
        own_timer: Whether a timer of this gateway, for one try or for silence, ended the call: then a passed
            deadline is the target's fault. The client's own deadline is not.
    """
    if code == "OK":
        return Verdict.SUCCESS
    if code in FAILURE_CODES or (code == "DEADLINE_EXCEEDED" and own_timer):
        return Verdict.FAILURE
    return Verdict.NEUTRAL


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """When a breaker opens, and for how long.

    Attributes:
        window_s: How far back calls count.
        buckets: Into how many parts the window is cut; the oldest falls out as a whole.
        calls_min: Fewer calls in the window say nothing.
        failed_percent: It opens at this share of failed calls, in whole per cent.
        sleep_s: How long it stays open before one call tries the target.
        row_max: It opens also when so many calls failed in a row; None: only by volume and percentage.
    """

    window_s: float = 10.0
    buckets: int = 10
    calls_min: int = 20
    failed_percent: int = 50
    sleep_s: float = 5.0
    row_max: int | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one call; its outcome is settled with it.

    Attributes:
        era: The era in which it was given.
        trial: Whether this call decides alone.
    """

    era: int
    trial: bool


@dataclass(frozen=True, slots=True)
class Breaker:
    """What the table knows of one target.

    Attributes:
        limits: When it opens.
        window: The calls that ended lately.
        state: Whether calls pass.
        era: Counts the changes of state.
        changed_s: When the state last changed.
        row: Calls that failed since the last success.
    """

    limits: BreakerLimits
    window: RollingWindow
    state: State = State.CLOSED
    era: int = 0
    changed_s: float = 0.0
    row: int = 0

    def tally(self, now_s: float) -> Tally:
        """The calls in the window."""
        return self.window.tally(now_s)

    def sleep_left_s(self, now_s: float) -> float:
        """How long no call is tried; 0 unless it is open by itself."""
        if self.state is not State.OPEN:
            return 0.0
        return max(0.0, self.changed_s + self.limits.sleep_s - now_s)


def new_breaker(limits: BreakerLimits, now_s: float) -> Breaker:
    """A breaker that has seen nothing: closed."""
    return Breaker(limits, RollingWindow(limits.window_s, limits.buckets), changed_s=now_s)


def admit(breaker: Breaker, now_s: float) -> tuple[Breaker, Permit | None]:
    """Asks for leave to make a call; None: no. The first to ask after the sleep gets the trial."""
    if breaker.state in {State.CLOSED, State.FORCED_CLOSED}:
        return breaker, Permit(breaker.era, trial=False)
    if breaker.state is State.OPEN and breaker.sleep_left_s(now_s) <= 0:
        tried = _moved(breaker, State.HALF_OPEN, now_s)
        return tried, Permit(tried.era, trial=True)
    return breaker, None


def settle(breaker: Breaker, permit: Permit, verdict: Verdict, now_s: float) -> Breaker:
    """Tells how a call ended; one of an earlier era changes nothing."""
    if permit.era != breaker.era:
        return breaker
    return TABLE[breaker.state, verdict](breaker, verdict, now_s)


def force(breaker: Breaker, state: State, now_s: float) -> Breaker:
    """Holds it in one of `FORCED`; any other state lets it go, and it begins closed with an empty window."""
    if state in FORCED:
        return breaker if state is breaker.state else _moved(breaker, state, now_s)
    return _closed(breaker, now_s) if breaker.state in FORCED else breaker


def renewed(breaker: Breaker, now_s: float) -> Breaker:
    """The breaker once its target is a new process: nothing of the old one counts. A hold stays."""
    return breaker if breaker.state in FORCED else _closed(breaker, now_s)


def closed_by_hand(breaker: Breaker, now_s: float) -> Breaker:
    """The breaker closed, whatever held it open."""
    return breaker if breaker.state is State.CLOSED else _closed(breaker, now_s)


def opened_by_hand(breaker: Breaker, now_s: float) -> Breaker:
    """The breaker open from now on, for one sleep."""
    return _moved(breaker, State.OPEN, now_s)


# --- transitions --------------------------------------------------------------------------------------------


def _moved(breaker: Breaker, state: State, now_s: float) -> Breaker:
    return replace(breaker, state=state, era=breaker.era + 1, changed_s=now_s)


def _closed(breaker: Breaker, now_s: float) -> Breaker:
    return replace(_moved(breaker, State.CLOSED, now_s), window=breaker.window.cleared(), row=0)


def _count(breaker: Breaker, verdict: Verdict, now_s: float) -> Breaker:
    failed = verdict is Verdict.FAILURE
    window = breaker.window.counted(now_s, failed=failed)
    row = breaker.row + 1 if failed else 0
    # Spelled out: this is done several times a request, and `replace` takes four times as long.
    return Breaker(breaker.limits, window, breaker.state, breaker.era, breaker.changed_s, row)


def _count_and_judge(breaker: Breaker, verdict: Verdict, now_s: float) -> Breaker:
    counted = _count(breaker, verdict, now_s)
    return _moved(counted, State.OPEN, now_s) if trips(counted, now_s) else counted


def trips(breaker: Breaker, now_s: float) -> bool:
    """Whether the window holds enough calls and too many of them failed, or too many did in a row."""
    tally, limits = breaker.tally(now_s), breaker.limits
    if limits.row_max is not None and breaker.row >= limits.row_max:
        return True
    return tally.calls >= limits.calls_min and tally.failed_percent >= limits.failed_percent


def _close(breaker: Breaker, _: Verdict, now_s: float) -> Breaker:
    return _closed(breaker, now_s)


def _reopen(breaker: Breaker, _: Verdict, now_s: float) -> Breaker:
    return _moved(breaker, State.OPEN, now_s)


def _ignore(breaker: Breaker, _: Verdict, __: float) -> Breaker:
    return breaker


Transition = Callable[[Breaker, Verdict, float], Breaker]

# OPEN and FORCED_OPEN admit nothing, so no outcome of their era exists.
TABLE: dict[tuple[State, Verdict], Transition] = {
    (State.CLOSED, Verdict.SUCCESS): _count_and_judge,
    (State.CLOSED, Verdict.FAILURE): _count_and_judge,
    (State.CLOSED, Verdict.NEUTRAL): _ignore,
    (State.HALF_OPEN, Verdict.SUCCESS): _close,
    (State.HALF_OPEN, Verdict.FAILURE): _reopen,
    (State.HALF_OPEN, Verdict.NEUTRAL): _reopen,
    # A hold is not judged, but its calls are counted and shown.
    (State.FORCED_CLOSED, Verdict.SUCCESS): _count,
    (State.FORCED_CLOSED, Verdict.FAILURE): _count,
    (State.FORCED_CLOSED, Verdict.NEUTRAL): _ignore,
}
