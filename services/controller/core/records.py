"""What controllers write for gateways and for each other: workers, routes, who leads. Data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.controller.core.rollout_record import Rollout


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One worker, as gateways see it.

    Attributes:
        worker_id: Its name.
        address: `host:port` of its WorkerService.
        incarnation: Names its process: another one is a restart.
        slots: Sequences that it runs at once.
        draining: Whether it takes no new ones.
        ready: Revisions that it can run now.
        lease_ttl_s: How long the record holds without being written again.
    """

    worker_id: str
    address: str
    incarnation: str
    slots: int
    draining: bool
    ready: frozenset[str]
    lease_ttl_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Which revisions of a model serve.

    Attributes:
        epoch: Grows with every change of the route.
        fence: The fencing number of the controller that wrote last.
        weights: Revision -> its share; weights are parts of their sum.
    """

    epoch: int
    fence: int
    weights: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class BreakerRecord:
    """The breaker between one gateway and one of its targets, as the gateway shows it.

    Attributes:
        gateway_id: The gateway.
        target: A worker's id, or `store`.
        state: `closed`, `open`, `half_open`, `forced_open` or `forced_closed`.
        calls: Calls in the rolling window.
        failures: Those of them that failed.
        changed_s: When it came into this state, in seconds since the epoch.
    """

    gateway_id: str
    target: str
    state: str
    calls: int
    failures: int
    changed_s: float


@dataclass(frozen=True, slots=True)
class KnownMembers:
    """The members of a model that the store knows.

    Attributes:
        workers: Those that have a record.
        gateways: Those that were seen a moment ago.
    """

    workers: frozenset[str]
    gateways: frozenset[str]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a controller stands that asked for the lead.

    Attributes:
        fence: Its fencing number, above that of every controller before it; 0: it does not lead.
        leader_id: Who leads; empty: nobody.
    """

    fence: int
    leader_id: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The rollouts of a model, taken over from the controller that led before.

    Attributes:
        fence: The fencing number of the claim.
        rollouts: Every rollout, oldest first.
        is_partial: Whether there may be more, where nobody could look now.
    """

    fence: int
    rollouts: tuple[Rollout, ...]
    is_partial: bool = False
