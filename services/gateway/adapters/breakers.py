"""The breakers of this gateway. Owns: a circuit for each worker and for the store, and who hears of moves.

Each move is logged and told to the board that the queue's grants obey. What is told is a level, not an edge:
a board that could not be reached is told the latest state as soon as it can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from services.common import logs
from services.common.clock import Clock
from services.common.errors import InterlockError, StoreUnavailable
from services.gateway.adapters.pybreaker_circuit import Change, Circuit
from services.gateway.core.breaker import FORCED, BreakerLimits, State, Verdict
from services.gateway.core.ports import BreakerBoard

STORE = "store"

# A call of the store has been repeated on a new connection before it fails, and jobs can wait here meanwhile:
# one failure is enough to stop asking, and a look each second is soon enough to find it back.
STORE_LIMITS = BreakerLimits(row_max=1, sleep_s=0.9)
# A mesh has dozens of workers; names come from grants and operators, and are kept while the process lives.
TARGETS_MAX = 1_024
# A board that is away is asked again this often; what it is told is a handful of states.
TELL_AGAIN_S = 0.5
# The board's clock counts whole milliseconds, and must not offer a trial before the sleep is over here.
SLEEP_MARGIN_S = 0.05


@dataclass(frozen=True, slots=True)
class BreakerReport:
    """One breaker as the fleet sees it.

    Attributes:
        target: A worker's id, or `store`.
        state: Whether calls pass.
        calls: Calls in the window.
        failures: Those of them that failed.
        changed_s: When it came into this state, in seconds since the epoch.
    """

    target: str
    state: State
    calls: int
    failures: int
    changed_s: float


class Breakers:
    """Every circuit of this gateway.

    Args:
        clock: Measures.
        limits: When a worker's breaker opens.
        store_limits: When the store's does.
    """

    def __init__(
        self, clock: Clock, limits: BreakerLimits | None = None, store_limits: BreakerLimits | None = None
    ) -> None:
        self._clock = clock
        self._limits = limits or BreakerLimits()
        self._board: BreakerBoard | None = None
        self._models: dict[str, str] = {}
        self._incarnations: dict[str, str] = {}
        self._untold: dict[str, None] = {}
        self._telling: asyncio.Task[None] | None = None
        self.store = Circuit(STORE, store_limits or STORE_LIMITS, clock, self._moved)
        self._circuits = {STORE: self.store}

    def use_board(self, board: BreakerBoard) -> None:
        """Says who is told of workers' breakers."""
        self._board = board

    def worker(self, worker_id: str, model: str) -> Circuit:
        """The circuit of a worker that serves `model`."""
        circuit = self._circuits.get(worker_id)
        if circuit is None:
            if len(self._circuits) >= TARGETS_MAX:
                self._drop_oldest()
            circuit = Circuit(worker_id, self._limits, self._clock, self._moved)
            self._circuits[worker_id] = circuit
        if self._models.get(worker_id) != model:
            # What an earlier process of this gateway told the board does not hold any more.
            self._models[worker_id] = model
            self.tell(worker_id)
        return circuit

    def meet(self, model: str, worker_id: str, incarnation: str) -> None:
        """Hears which process a worker is; another one than before starts closed."""
        known = self._incarnations.get(worker_id)
        self._incarnations[worker_id] = incarnation
        circuit = self.worker(worker_id, model)
        if known is not None and known != incarnation:
            circuit.renew()

    def hold(self, holds: Mapping[str, State]) -> None:
        """Holds what operators want held, and lets everything else go."""
        for target, circuit in self._circuits.items():
            wanted = holds.get(target, State.CLOSED)
            if wanted in FORCED or circuit.breaker.state in FORCED:
                circuit.force(wanted)

    def reports(self) -> tuple[BreakerReport, ...]:
        """All of them, by target."""
        now_s = self._clock.monotonic()
        offset_s = self._clock.now() - now_s
        found = []
        for target, circuit in sorted(self._circuits.items()):
            tally = circuit.breaker.tally(now_s)
            changed_s = circuit.breaker.changed_s + offset_s
            state = circuit.breaker.state
            found.append(BreakerReport(target, state, tally.calls, tally.failures, changed_s))
        return tuple(found)

    def opened(self, model: str) -> dict[str, float | None]:
        """The workers of a model that get no calls, and how long they get none; None: they are held."""
        found: dict[str, float | None] = {}
        for target in (name for name, served in self._models.items() if served == model):
            match self._circuits[target].breaker.state:
                case State.OPEN:
                    found[target] = self._circuits[target].sleep_left_s + SLEEP_MARGIN_S
                case State.HALF_OPEN:
                    # As the grant of the trial has listed it.
                    found[target] = self._limits.sleep_s
                case State.FORCED_OPEN:
                    found[target] = None
        return found

    def tell(self, worker_id: str) -> None:
        """Tells the board of a worker's state, now or as soon as it can be reached."""
        if self._board is None:
            return
        self._untold[worker_id] = None
        if self._telling is None:
            context = logs.process_context()
            self._telling = asyncio.get_running_loop().create_task(self._tell_all(), context=context)

    async def close(self) -> None:
        """Gives up what is still untold."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    def _moved(self, change: Change) -> None:
        # The gateway's own id stands on every line of its log.
        logs.get_logger().warning(
            "breaker.moved", target=change.target, old=change.old.value, state=change.new.value
        )
        if change.target != STORE:
            self.tell(change.target)

    def _drop_oldest(self) -> None:
        """Forgets the circuit that was made first, the store's excepted."""
        oldest = next(target for target in self._circuits if target != STORE)
        del self._circuits[oldest]
        self._models.pop(oldest, None)
        self._incarnations.pop(oldest, None)

    async def _tell_all(self) -> None:
        try:
            while self._untold:
                worker_id = next(iter(self._untold))
                del self._untold[worker_id]
                try:
                    await self._tell(worker_id)
                except Exception as error:  # noqa: BLE001 - a worker that stays listed as open gets no calls
                    if not isinstance(error, StoreUnavailable):
                        logs.get_logger().error("breakers.crashed", exc_info=True)
                    self._untold[worker_id] = None
                    await asyncio.sleep(TELL_AGAIN_S)
        finally:
            self._telling = None

    async def _tell(self, worker_id: str) -> None:
        circuit, model = self._circuits.get(worker_id), self._models.get(worker_id)
        if circuit is None or model is None or self._board is None:
            return
        match circuit.breaker.state:
            case State.OPEN:
                await self._board.list_open(model, worker_id, circuit.sleep_left_s + SLEEP_MARGIN_S)
            case State.FORCED_OPEN:
                await self._board.list_open(model, worker_id, None)
            case State.CLOSED | State.FORCED_CLOSED:
                await self._board.list_closed(model, worker_id)
            case State.HALF_OPEN:
                # The grant of the trial has listed the pair as open again.
                pass


def store_verdict_of(error: BaseException) -> Verdict:
    """What the end of a call says of the shared queue's store; a refusal is an answer."""
    if isinstance(error, StoreUnavailable):
        return Verdict.FAILURE
    return Verdict.SUCCESS if isinstance(error, InterlockError) else Verdict.NEUTRAL
