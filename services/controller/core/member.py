"""One member of the mesh as plain data, and what it may say. Must not know how any of it is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from services.controller.core.judgement import Tally
from services.controller.core.residency import Phase, Resident


class Kind(StrEnum):
    """What a member is."""

    WORKER = "worker"
    GATEWAY = "gateway"


class Presence(StrEnum):
    """Whether a member is there."""

    UNKNOWN = "UNKNOWN"
    ATTACHED = "ATTACHED"
    DETACHED = "DETACHED"  # its stream broke, its lease has not run out
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class Device:
    """What a worker computes with; `memory_bytes` may hold weights and KV cache."""

    kind: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker carries right now; counters run since its process started."""

    running: int = 0
    slots: int = 0
    memory_bytes: int = 0
    steps: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Hello:
    """Who it is, and what it holds already: the first thing that a member says."""

    kind: Kind
    id: str
    incarnation: str
    address: str = ""
    slots: int = 0
    devices: tuple[Device, ...] = ()
    residents: Mapping[str, Resident] = field(default_factory=dict)
    epoch: int = 0
    fence: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The sign of life, every second.

    Attributes:
        load: What a worker carries; a gateway's is empty.
        tallies: What a gateway has counted since its process started, by model and revision.
    """

    load: Load
    tallies: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a preparation is."""

    revision: str
    step: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Staged:
    """A revision's files are there and checked; nothing is loaded."""

    revision: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A revision has generated a token; for a gateway: its tokenizer is loaded."""

    revision: str
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Activated:
    """The member knows that the revision serves from this epoch on."""

    revision: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A revision cannot be prepared, or no longer be served."""

    revision: str
    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class Retired:
    """A revision was unloaded."""

    revision: str


@dataclass(frozen=True, slots=True)
class Proven:
    """A revision that serves was asked its golden prompts; the reason says why it fell short, if it did."""

    revision: str
    reason: str


@dataclass(frozen=True, slots=True)
class StreamBroken:
    """The stream ended without a goodbye."""


@dataclass(frozen=True, slots=True)
class Farewell:
    """The member closed its side of the stream: it leaves."""


@dataclass(frozen=True, slots=True)
class Silence:
    """The lease ran out."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """An operator takes the member out of service."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class RetireAsked:
    """Nobody needs a revision of this member any more, and the store gives it to nobody."""

    revision: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed, or the goal has changed."""


Report: TypeAlias = LoadReport | Progress | Staged | Ready | Activated | Failed | Retired
"""What a member says of itself after its hello."""

Event: TypeAlias = Hello | Report | StreamBroken | Farewell | Silence | DrainAsked | RetireAsked | Tick


@dataclass(frozen=True, slots=True)
class Goal:
    """What a member of a model shall hold.

    Attributes:
        model: The model.
        holds: The revisions that it shall have ready, with the epoch from which on each serves; 0: it
            does not serve yet. Others that it has go as soon as nobody needs them.
        rollout_id: The rollout that asks for it; empty: none.
        quiet: Whether a worker shall get nothing new: what it holds is about to go.
        stages: Revisions whose files it shall have, and not load yet.
        prepare_timeout_s: How long one preparation may take, where that is longer than usual.
    """

    model: str
    holds: Mapping[str, int]
    rollout_id: str = ""
    quiet: bool = False
    stages: frozenset[str] = frozenset()
    prepare_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker or gateway as the controller sees it.

    Attributes:
        kind: What it is.
        id: Its name, stable over restarts.
        incarnation: Names its process.
        address: Where others reach it.
        slots: Sequences that it takes at once, as last reported.
        devices: A worker's devices.
        presence: Whether it is there.
        drain_grace_s: Set when an operator took it out of service: how long it may end what runs.
        residents: The revisions inside it, by name.
        load: What it carries, as last reported.
        epoch: The highest epoch that it reported.
        quiet: Whether it gets nothing new for the sake of a rollout.
        lost_during: The rollout that was under way when its lease ran out; empty: none.
        attached_s: When it said hello, on the monotonic clock.
        lease_end_s: When it counts as lost unless it speaks, on the monotonic clock.
    """

    kind: Kind
    id: str
    incarnation: str = ""
    address: str = ""
    slots: int = 0
    devices: tuple[Device, ...] = ()
    presence: Presence = Presence.UNKNOWN
    drain_grace_s: float | None = None
    residents: Mapping[str, Resident] = field(default_factory=dict)
    load: Load = Load()
    epoch: int = 0
    quiet: bool = False
    lost_during: str = ""
    attached_s: float = 0.0
    lease_end_s: float = 0.0

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new: an operator said so, or a worker that is ending reports no slots."""
        ending = self.kind is Kind.WORKER and self.slots == 0
        return ending or self.drain_grace_s is not None

    @property
    def active_revisions(self) -> frozenset[str]:
        """The revisions that new requests may name."""
        return frozenset(name for name, resident in self.residents.items() if resident.phase is Phase.ACTIVE)

    @property
    def listing(self) -> Listing | None:
        """How gateways shall see this worker; None: not at all."""
        gone = self.presence in {Presence.UNKNOWN, Presence.LOST}
        if self.kind is not Kind.WORKER or gone or not self.active_revisions:
            return None
        # A broken stream mostly means a dead process: nothing new goes there unless it attaches again.
        draining = self.draining or self.quiet or self.presence is Presence.DETACHED
        return Listing(self.address, self.incarnation, self.slots, draining, self.active_revisions)


@dataclass(frozen=True, slots=True)
class Listing:
    """The part of a worker's record that is not its lease."""

    address: str
    incarnation: str
    slots: int
    draining: bool
    revisions: frozenset[str]
