"""The breaker on pybreaker. Owns: where the library's circuit and the core's table meet.

The table decides; the circuit carries its state under the library's names and tells its listeners. It must
not know what is called. See `docs/adr/0007-the-breaker-is-a-table.md`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import pybreaker

from services.common.clock import Clock
from services.gateway.core import breaker as table
from services.gateway.core.breaker import Breaker, BreakerLimits, Permit, State, Verdict

T = TypeVar("T")

# The library knows three states; what an operator holds looks to it like what it does.
_LIBRARY_STATES = {
    State.CLOSED: pybreaker.STATE_CLOSED,
    State.OPEN: pybreaker.STATE_OPEN,
    State.HALF_OPEN: pybreaker.STATE_HALF_OPEN,
    State.FORCED_OPEN: pybreaker.STATE_OPEN,
    State.FORCED_CLOSED: pybreaker.STATE_CLOSED,
}
# The circuit trips when the storage's counter reaches this; the counter reaches it when the window trips.
_TRIPPED = 1


@dataclass(frozen=True, slots=True)
class Change:
    """A breaker moved from one state to another."""

    target: str
    old: State
    new: State


class TableStorage(pybreaker.CircuitBreakerStorage):
    """The state of a circuit, kept in the core's table.

    What the library says to its storage is written into the table: a failure counts in the window, and the
    counter trips by volume and percentage instead of by failures in a row.
    """

    def __init__(self, name: str, limits: BreakerLimits, clock: Clock) -> None:
        super().__init__(name)
        self._clock = clock
        self._opened_at: datetime | None = None
        self.breaker: Breaker = table.new_breaker(limits, clock.monotonic())

    @property
    def state(self) -> str:
        """The table's state by the library's name."""
        return _LIBRARY_STATES[self.breaker.state]

    @state.setter
    def state(self, state: str) -> None:
        if state == self.state:
            return
        now_s = self._clock.monotonic()
        if state == pybreaker.STATE_OPEN:
            self.breaker = table.opened_by_hand(self.breaker, now_s)
        elif state == pybreaker.STATE_CLOSED:
            self.breaker = table.closed_by_hand(self.breaker, now_s)

    def increment_counter(self) -> None:
        """A failure that the library saw counts in the window."""
        self._count(Verdict.FAILURE)

    def reset_counter(self) -> None:
        """The library forgets its failures at each success; the window forgets by time alone."""

    def increment_success_counter(self) -> None:
        """One success closes the circuit; there is nothing to count."""

    def reset_success_counter(self) -> None:
        """See `increment_success_counter`."""

    @property
    def counter(self) -> int:
        """`_TRIPPED` when the table has opened or would; otherwise less."""
        tripped = self.breaker.state is State.OPEN or table.trips(self.breaker, self._clock.monotonic())
        return _TRIPPED if tripped else 0

    @property
    def success_counter(self) -> int:
        """Enough: see `increment_success_counter`."""
        return 1

    @property
    def opened_at(self) -> datetime | None:
        """When the library opened it, by the machine's clock; the table measures by the monotonic one."""
        return self._opened_at

    @opened_at.setter
    def opened_at(self, at: datetime) -> None:
        self._opened_at = at

    def _count(self, verdict: Verdict) -> None:
        permit = Permit(self.breaker.era, trial=False)
        if (self.breaker.state, verdict) in table.TABLE:
            self.breaker = table.settle(self.breaker, permit, verdict, self._clock.monotonic())


class _Reporter(pybreaker.CircuitBreakerListener):
    """Hears of the circuit's transitions from the library.

    The library tells its listeners before it writes its storage. The state is written here, so that whoever
    hears of a close finds the window cleared.
    """

    def __init__(self, storage: TableStorage, report: Callable[[], None]) -> None:
        self._storage = storage
        self._report = report

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,  # noqa: ARG002 - the library's signature
        old_state: pybreaker.CircuitBreakerState | None,  # noqa: ARG002 - the library's signature
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        """Reports what the table says then, which is finer than the library's three states."""
        self._storage.state = new_state.name
        self._report()


class Circuit:
    """One breaker: asked before each call, and told how the call ended. For one event loop.

    Args:
        target: What is called: a worker's id, or `store`.
        limits: When it opens.
        clock: Measures.
        on_change: Hears of each change of state, once.
    """

    def __init__(
        self, target: str, limits: BreakerLimits, clock: Clock, on_change: Callable[[Change], None]
    ) -> None:
        self.target = target
        self._clock = clock
        self._on_change = on_change
        self._told = State.CLOSED
        self._storage = TableStorage(target, limits, clock)
        self.library = pybreaker.CircuitBreaker(
            fail_max=_TRIPPED,
            reset_timeout=limits.sleep_s,
            listeners=[_Reporter(self._storage, self._report)],
            state_storage=self._storage,
            name=target,
        )

    @property
    def breaker(self) -> Breaker:
        """What the table says."""
        return self._storage.breaker

    @property
    def sleep_left_s(self) -> float:
        """How long no call is tried."""
        return self.breaker.sleep_left_s(self._clock.monotonic())

    def admit(self) -> Permit | None:
        """Asks for leave to make a call."""
        changed, permit = table.admit(self.breaker, self._clock.monotonic())
        self._become(changed)
        return permit

    def settle(self, permit: Permit, verdict: Verdict) -> None:
        """Tells how a call ended."""
        self._become(table.settle(self.breaker, permit, verdict, self._clock.monotonic()))

    def pass_trial(self, permit: Permit) -> Permit:
        """Tells that a trial goes well before it has ended; how it ends is settled with what is returned.

        That end is then an ordinary call's, of the era that the trial began; of a trial that came too late to
        decide anything it still changes nothing.
        """
        decides = permit.era == self.breaker.era
        self.settle(permit, Verdict.SUCCESS)
        return Permit(self.breaker.era if decides else permit.era, trial=False)

    def force(self, state: State) -> None:
        """Holds it, or lets it go."""
        self._become(table.force(self.breaker, state, self._clock.monotonic()))

    def renew(self) -> None:
        """Its target is a new process."""
        self._become(table.renewed(self.breaker, self._clock.monotonic()))

    async def acall(self, call: Callable[[], Awaitable[T]], judge: Callable[[BaseException], Verdict]) -> T:
        """Makes one call under the breaker; nothing is held while it is awaited.

        Args:
            call: What is called.
            judge: What an exception says of the target.

        Raises:
            pybreaker.CircuitBreakerError: It is open.
        """
        permit = self.admit()
        if permit is None:
            raise pybreaker.CircuitBreakerError(f"{self.target} is not called now")
        try:
            result = await call()
        except BaseException as error:
            self.settle(permit, judge(error))
            raise
        self.settle(permit, Verdict.SUCCESS)
        return result

    def _become(self, changed: Breaker) -> None:
        before = self.breaker
        self._storage.breaker = changed
        if changed.era == before.era:
            # Calls were counted; the state is what it was.
            return
        if changed.state is State.OPEN and before.state is not State.OPEN:
            self._storage.opened_at = datetime.now(UTC)
        # Reading the state makes the library notice that its storage moved, and tell its listeners.
        _ = self.library.state
        # Holds are moves that the library cannot tell from its own states.
        self._report()

    def _report(self) -> None:
        old, self._told = self._told, self.breaker.state
        if old is not self._told:
            self._on_change(Change(self.target, old, self._told))
