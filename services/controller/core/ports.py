"""The ports of the controller: what its coordinator needs of the world, in as few verbs as it takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Protocol

from services.controller.core.commands import Command
from services.controller.core.records import (
    BreakerRecord,
    Claimed,
    KnownMembers,
    Route,
    Standing,
    WorkerRecord,
)
from services.controller.core.rollout_record import Rollout


class FenceStale(Exception):
    """A write was refused: the store has seen a controller with a higher fencing number."""


class RouteStore(Protocol):
    """Where gateways read which workers exist and which revisions serve.

    Every method raises StoreUnavailable when the store cannot be reached. A write raises FenceStale, and
    changes nothing, when its fence is below the one that the route bears; the route keeps the highest
    fence that it was written with. The same write again has the same effect.
    """

    async def read_route(self, model: str) -> Route | None:
        """The route with its epoch and fence; None where nothing was written."""
        ...

    async def read_members(self, model: str) -> KnownMembers:
        """Who is there, as far as the store knows."""
        ...

    async def read_awaited(self, model: str) -> frozenset[str]:
        """The revisions that waiting requests must go on with: their text began there."""
        ...

    async def write_route(self, model: str, epoch: int, fence: int, weights: Mapping[str, int]) -> None:
        """Replaces the route in one step; an empty `weights` routes nothing."""
        ...

    async def write_worker(self, model: str, record: WorkerRecord, fence: int) -> None:
        """Replaces one worker's record, or renews its lease."""
        ...

    async def unready(
        self, model: str, worker_id: str, revision: str, fence: int, *, routed: bool = False
    ) -> bool:
        """Takes a revision from a worker that is to unload it, if nobody needs it there.

        Args:
            model: The model.
            worker_id: The worker.
            revision: What it shall unload.
            fence: The writer's fencing number.
            routed: Whether it may go although new requests get it: they wait.

        Returns:
            False, and nothing has changed, while the route serves the revision, the worker runs a request
            with it, or a request must go on with it and no other worker holds it.
        """
        ...

    async def remove_worker(self, model: str, worker_id: str, fence: int) -> None:
        """Removes one worker's record; without effect where there is none."""
        ...


class Lead(Protocol):
    """The lease by which one controller of a model leads. Methods raise StoreUnavailable."""

    async def take(self, *, may_found: bool, may_replace: bool) -> Standing:
        """Asks for the lead; it is granted when the lease is free, or ours already.

        Args:
            may_found: Whether it is also granted where the store knows of no lease at all.
            may_replace: Whether it is also taken from a controller of our own id: an earlier process.
        """
        ...

    async def keep(self, fence: int) -> None:
        """Renews the lease, and lets it bear `fence` from now on; founds it where the store lost it.

        Raises:
            FenceStale: Another controller leads.
        """
        ...

    async def leave(self) -> None:
        """Gives the lead to whoever asks next; without effect where another controller has it."""
        ...


class RolloutRecords(Protocol):
    """Where rollouts outlive the controller that leads them. Methods raise StoreUnavailable."""

    async def claim(self, model: str, fence: int) -> Claimed:
        """Takes a model's records over: what earlier claimants save from now on is not read by anybody.

        The claim bears `fence`, or a number above every one that was claimed with.

        Raises:
            FenceStale: Another controller took them over meanwhile.
        """
        ...

    async def save(self, rollout: Rollout) -> None:
        """Replaces the record; once it returns, a crash loses nothing of it. `claim` comes first.

        Raises:
            FenceStale: Another controller has taken the records over.
            StoreUnavailable: It cannot be written now; the record is as it was.
        """
        ...

    def close(self) -> None:
        """Ends what runs for it. Does not wait."""
        ...


class BreakerFleet(Protocol):
    """The breakers of all gateways. Methods raise StoreUnavailable when they cannot be reached."""

    async def list_breakers(self, gateway_ids: Iterable[str]) -> tuple[BreakerRecord, ...]:
        """What these gateways show, by gateway and target."""
        ...

    async def holds(self) -> Mapping[str, str]:
        """What is held, and in which state, by target."""
        ...

    async def hold(self, target: str, state: str) -> None:
        """Has every gateway hold a target's breaker `forced_open` or `forced_closed`; `closed` lets it go."""
        ...


class MemberStream(Protocol):
    """The way from the controller to one member. Neither verb waits."""

    def send(self, command: Command) -> None:
        """Sends `command` after those before it."""
        ...

    def end(self, reason: str) -> None:
        """Ends the stream; the member may attach again. `reason` is for people."""
        ...


class RevisionFiles(Protocol):
    """The content of revisions."""

    def read(self, model: str, revision: str, path: str, offset: int) -> AsyncIterator[bytes]:
        """Yields a file from `offset` on, in pieces of at most 1 MiB.

        Raises:
            ModelUnknown: No such model is registered.
            RevisionUnknown: The model has no such revision.
            ArgumentInvalid: The revision has no such file, or the offset lies behind its end.
        """
        ...
