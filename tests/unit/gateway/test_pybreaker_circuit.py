"""The breaker on pybreaker: its public API obeys the table, and calls are admitted one by one."""

from __future__ import annotations

import asyncio

import pybreaker
import pytest

from services.gateway.adapters.pybreaker_circuit import Change, Circuit
from services.gateway.core.breaker import BreakerLimits, State, Verdict
from tests.fakes.turned_clock import TurnedClock


class Target:
    """A circuit, its clock, and what was heard of it."""

    def __init__(self) -> None:
        self.clock = TurnedClock()
        self.changes: list[Change] = []
        self.circuit = Circuit("w1", BreakerLimits(), self.clock, self.changes.append)

    def fail(self, times: int) -> None:
        """So many calls fail."""
        for _ in range(times):
            permit = self.circuit.admit()
            assert permit is not None
            self.circuit.settle(permit, Verdict.FAILURE)

    @property
    def states(self) -> list[State]:
        """The states that it came into."""
        return [change.new for change in self.changes]


@pytest.fixture
def target() -> Target:
    """A closed circuit."""
    return Target()


def test_the_library_carries_the_state_and_its_listener_tells_it(target: Target) -> None:
    """Open, trial and recovery are seen through pybreaker, each told once."""
    target.fail(20)
    assert target.circuit.library.current_state == pybreaker.STATE_OPEN
    target.clock.turn(5)
    permit = target.circuit.admit()
    assert target.circuit.library.current_state == pybreaker.STATE_HALF_OPEN
    assert permit is not None
    target.circuit.settle(permit, Verdict.SUCCESS)
    assert target.circuit.library.current_state == pybreaker.STATE_CLOSED
    assert target.states == [State.OPEN, State.HALF_OPEN, State.CLOSED]


def test_the_librarys_own_call_trips_by_volume_and_percentage(target: Target) -> None:
    """`call` of pybreaker itself opens at the twentieth failure, where it would by itself at the first."""

    def broken() -> None:
        raise ConnectionError("gone")

    for _ in range(19):
        with pytest.raises(ConnectionError):
            target.circuit.library.call(broken)
    with pytest.raises(pybreaker.CircuitBreakerError):
        target.circuit.library.call(broken)
    assert target.circuit.breaker.state is State.OPEN
    assert target.circuit.admit() is None


def test_the_librarys_own_hand_moves_the_table(target: Target) -> None:
    """`open` and `close` of pybreaker are transitions like all others; closing clears the window."""
    target.fail(19)
    target.circuit.library.open()
    assert target.circuit.admit() is None
    target.circuit.library.close()
    assert target.circuit.breaker.tally(target.clock.monotonic()).calls == 0
    assert target.states == [State.OPEN, State.CLOSED]


async def test_twenty_callers_at_half_open_make_one_trial(target: Target) -> None:
    """They come at once when the sleep is over: one is let through, nineteen are refused."""
    target.fail(20)
    target.clock.turn(5)
    arrived, release, calls = asyncio.Event(), asyncio.Event(), 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        arrived.set()
        await release.wait()
        return "well"

    async def attempt() -> str:
        return await target.circuit.acall(call, lambda _: Verdict.FAILURE)

    tasks = [asyncio.create_task(attempt()) for _ in range(20)]
    await arrived.wait()
    release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert calls == 1
    assert results.count("well") == 1
    assert sum(isinstance(result, pybreaker.CircuitBreakerError) for result in results) == 19
    assert target.circuit.breaker.state is State.CLOSED


async def test_a_cancelled_call_and_a_clients_error_move_nothing(target: Target) -> None:
    """Forty of them leave the window empty; as many lost connections open it."""

    def judge(error: BaseException) -> Verdict:
        return Verdict.FAILURE if isinstance(error, ConnectionError) else Verdict.NEUTRAL

    async def fail_with(error: BaseException) -> None:
        async def call() -> None:
            raise error

        with pytest.raises(type(error)):
            await target.circuit.acall(call, judge)

    for _ in range(20):
        await fail_with(asyncio.CancelledError())
        await fail_with(ValueError("a typing error"))
    assert target.circuit.breaker.tally(target.clock.monotonic()).calls == 0
    for _ in range(20):
        await fail_with(ConnectionError("gone"))
    assert target.states == [State.OPEN]


def test_holds_are_told_though_the_library_does_not_know_them(target: Target) -> None:
    """Forced open and forced closed are changes of their own, and a release is one."""
    for state in (State.FORCED_OPEN, State.FORCED_OPEN, State.FORCED_CLOSED, State.CLOSED):
        target.circuit.force(state)
    assert target.states == [State.FORCED_OPEN, State.FORCED_CLOSED, State.CLOSED]
    assert target.circuit.library.current_state == pybreaker.STATE_CLOSED


def test_a_new_process_ends_the_sleep(target: Target) -> None:
    """The target came back: its breaker is closed at once, and the old process's calls count no more."""
    late = target.circuit.admit()
    target.fail(20)
    assert target.circuit.sleep_left_s == 5
    target.circuit.renew()
    assert late is not None
    target.circuit.settle(late, Verdict.FAILURE)
    assert target.circuit.breaker.tally(target.clock.monotonic()).calls == 0
    assert target.circuit.admit() is not None
