"""What the core asks the shell to do. Owns: the effects of membership, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class SendLease:
    """Tell a member how long it may be silent, and who leads."""

    ttl_s: float
    fence: int


@dataclass(frozen=True, slots=True)
class SendPrepare:
    """Ask a member to make a revision ready. `rollout_id` is empty at the start of a mesh."""

    model: str
    revision: str
    rollout_id: str


@dataclass(frozen=True, slots=True)
class SendStage:
    """Ask a worker to fetch and verify a revision's files, and to load nothing."""

    model: str
    revision: str
    rollout_id: str


@dataclass(frozen=True, slots=True)
class SendActivate:
    """Tell a member that a revision serves from this epoch on."""

    model: str
    revision: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SendProve:
    """Ask a worker to let a revision that serves answer its golden prompts again."""

    revision: str


@dataclass(frozen=True, slots=True)
class SendRetire:
    """Tell a member to unload a revision once nothing runs on it."""

    revision: str


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell a member to stop preparing."""

    revision: str


@dataclass(frozen=True, slots=True)
class SendDrain:
    """Tell a member to take nothing new."""

    grace_s: float


Command: TypeAlias = (
    SendLease | SendPrepare | SendStage | SendActivate | SendProve | SendRetire | SendAbort | SendDrain
)
"""What travels to a member."""


@dataclass(frozen=True, slots=True)
class EndStream:
    """Close the member's stream."""

    reason: str


@dataclass(frozen=True, slots=True)
class WriteWorker:
    """The worker's record has changed."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class RemoveWorker:
    """The worker must get no more requests."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that operators want to read.

    Attributes:
        event: Its name, `noun.past_participle`.
        revision: The revision that it is about; empty: none.
        reason: Why, for people; empty where the event says it all.
    """

    event: str
    revision: str = ""
    reason: str = ""


Effect: TypeAlias = Command | EndStream | WriteWorker | RemoveWorker | Note
