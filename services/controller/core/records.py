"""What the controller writes for the gateways: which workers exist, and which revisions serve. Data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
