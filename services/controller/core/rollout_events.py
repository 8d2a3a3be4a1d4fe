"""What happens to a rollout, and what must be done about it. Data alone; `core.rollout` ties the two."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

Weights: TypeAlias = tuple[tuple[str, int], ...]
"""Revisions with their shares of new requests, sorted by name; no revision has the share 0."""


class Standing(StrEnum):
    """How far a revision is inside a worker."""

    ABSENT = "absent"
    STAGED = "staged"  # its files are here and whole
    PREPARING = "preparing"
    READY = "ready"  # it has generated a token; it may serve
    FAILED = "failed"
    GIVEN_UP = "given-up"  # it failed as often as it is tried


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker that counts, as far as a rollout cares.

    Attributes:
        worker_id: Its name.
        new: The revision that shall serve.
        old: The revision that served before.
        fits: Whether its memory holds both, by what it reported.
        failure: Why `new` failed; empty otherwise.
        old_failure: Why `old` failed; empty otherwise.
    """

    worker_id: str
    new: Standing = Standing.ABSENT
    old: Standing = Standing.ABSENT
    fits: bool = True
    failure: str = ""
    old_failure: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is there now.

    Attributes:
        workers: The workers, by name; one whose stream broke a moment ago among them.
        gateways_pending: Live gateways that have not acknowledged the new tokenizer.
    """

    workers: tuple[WorkerView, ...] = ()
    gateways_pending: int = 0


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begun:
    """The rollout is on record, and its turn has come."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Members changed, or a second passed: the fleet and the time are looked at again."""


@dataclass(frozen=True, slots=True)
class RouteWritten:
    """The store holds these weights."""

    weights: Weights


@dataclass(frozen=True, slots=True)
class FellShort:
    """The new revision was judged and is worse than it may be; `reason` says in what."""

    reason: str


@dataclass(frozen=True, slots=True)
class Promoted:
    """An operator wants the new revision to stay."""


@dataclass(frozen=True, slots=True)
class TakenBack:
    """An operator wants the old revision back."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """An operator wants it to end, wherever it is."""


@dataclass(frozen=True, slots=True)
class Paused:
    """An operator holds it: nothing moves on by itself."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The operator lets it go on."""


Event: TypeAlias = (
    Begun | Observed | RouteWritten | FellShort | Promoted | TakenBack | Cancelled | Paused | Resumed
)

# --- effects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Enter:
    """Put the state on record and tell everybody."""

    state: str
    cause: str


@dataclass(frozen=True, slots=True)
class SetRoute:
    """Bring the store's route to these weights, and say `RouteWritten` when it has them."""

    weights: Weights


@dataclass(frozen=True, slots=True)
class Swap:
    """Let a worker end what runs on the old revision, unload it and load the new one."""

    worker_id: str


Effect: TypeAlias = Enter | SetRoute | Swap
