"""A revision inside a member. Owns: the table of its phases, from the request to prepare it to serving.

Two rules: an event that the table does not list raises `EventIllegal` and changes nothing; and a revision
becomes ACTIVE only after it was READY. Must not know whether the member is there: that is `membership`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType


class EventIllegal(Exception):
    """A member said something that cannot follow what it said before."""


class Phase(StrEnum):
    """Where a revision is inside a member."""

    ABSENT = "ABSENT"
    STAGING = "STAGING"  # we asked for its files, and for no more
    STAGED = "STAGED"  # its files are there and whole; it takes no memory
    PREPARING = "PREPARING"
    READY = "READY"
    ACTIVATING = "ACTIVATING"
    ACTIVE = "ACTIVE"
    RETIRING = "RETIRING"  # we asked for its end; gateways see it no more
    ABORTING = "ABORTING"  # we asked to stop its preparation
    FAILED = "FAILED"


class Turn(StrEnum):
    """What moves a revision from phase to phase."""

    STAGE = "stage"  # we ask for its files
    STAGED = "staged"
    PREPARE = "prepare"  # we ask for it
    PROGRESS = "progress"
    READY = "ready"
    ACTIVATE = "activate"  # we tell the epoch
    ACTIVATED = "activated"
    FAIL = "fail"
    TIMEOUT = "timeout"  # we stop waiting
    RETIRE = "retire"  # we ask for its end
    ABORT = "abort"  # we ask to stop its preparation
    RETIRED = "retired"


# Messages cross: what a member sent before it read our last word is legal, and changes nothing.
TABLE = MappingProxyType(
    {
        (Phase.ABSENT, Turn.STAGE): Phase.STAGING,
        # We stopped waiting for it and then wanted it no more.
        (Phase.ABSENT, Turn.RETIRED): Phase.ABSENT,
        (Phase.STAGING, Turn.PROGRESS): Phase.STAGING,
        (Phase.STAGING, Turn.STAGED): Phase.STAGED,
        (Phase.STAGING, Turn.READY): Phase.READY,
        (Phase.STAGING, Turn.FAIL): Phase.FAILED,
        (Phase.STAGING, Turn.TIMEOUT): Phase.FAILED,
        (Phase.STAGING, Turn.RETIRED): Phase.ABSENT,
        (Phase.STAGING, Turn.ABORT): Phase.ABORTING,
        (Phase.STAGED, Turn.PREPARE): Phase.PREPARING,
        (Phase.STAGED, Turn.STAGED): Phase.STAGED,
        (Phase.STAGED, Turn.ABORT): Phase.ABORTING,
        # It was staged after all when it read that it shall stop; it is asked again.
        (Phase.STAGED, Turn.RETIRED): Phase.ABSENT,
        (Phase.ABSENT, Turn.PREPARE): Phase.PREPARING,
        (Phase.PREPARING, Turn.PROGRESS): Phase.PREPARING,
        # It had not yet read that it shall be loaded: it is asked again.
        (Phase.PREPARING, Turn.STAGED): Phase.STAGED,
        (Phase.PREPARING, Turn.READY): Phase.READY,
        (Phase.PREPARING, Turn.FAIL): Phase.FAILED,
        (Phase.PREPARING, Turn.TIMEOUT): Phase.FAILED,
        (Phase.PREPARING, Turn.RETIRED): Phase.ABSENT,
        (Phase.PREPARING, Turn.ABORT): Phase.ABORTING,
        (Phase.ABORTING, Turn.PROGRESS): Phase.ABORTING,
        (Phase.ABORTING, Turn.STAGED): Phase.ABORTING,
        (Phase.ABORTING, Turn.READY): Phase.READY,
        (Phase.ABORTING, Turn.FAIL): Phase.FAILED,
        (Phase.ABORTING, Turn.RETIRED): Phase.ABSENT,
        (Phase.READY, Turn.PROGRESS): Phase.READY,
        (Phase.READY, Turn.READY): Phase.READY,
        (Phase.READY, Turn.ACTIVATE): Phase.ACTIVATING,
        (Phase.READY, Turn.FAIL): Phase.FAILED,
        (Phase.READY, Turn.RETIRE): Phase.RETIRING,
        (Phase.READY, Turn.RETIRED): Phase.ABSENT,
        (Phase.ACTIVATING, Turn.READY): Phase.ACTIVATING,
        (Phase.ACTIVATING, Turn.ACTIVATE): Phase.ACTIVATING,
        (Phase.ACTIVATING, Turn.ACTIVATED): Phase.ACTIVE,
        (Phase.ACTIVATING, Turn.FAIL): Phase.FAILED,
        (Phase.ACTIVATING, Turn.RETIRE): Phase.RETIRING,
        (Phase.ACTIVATING, Turn.RETIRED): Phase.ABSENT,
        (Phase.ACTIVE, Turn.READY): Phase.ACTIVE,
        (Phase.ACTIVE, Turn.ACTIVATE): Phase.ACTIVE,
        (Phase.ACTIVE, Turn.ACTIVATED): Phase.ACTIVE,
        (Phase.ACTIVE, Turn.FAIL): Phase.FAILED,
        (Phase.ACTIVE, Turn.RETIRE): Phase.RETIRING,
        (Phase.ACTIVE, Turn.RETIRED): Phase.ABSENT,
        (Phase.RETIRING, Turn.PROGRESS): Phase.RETIRING,
        (Phase.RETIRING, Turn.READY): Phase.RETIRING,
        (Phase.RETIRING, Turn.ACTIVATED): Phase.RETIRING,
        (Phase.RETIRING, Turn.FAIL): Phase.FAILED,
        (Phase.RETIRING, Turn.RETIRED): Phase.ABSENT,
        (Phase.FAILED, Turn.STAGE): Phase.STAGING,
        (Phase.FAILED, Turn.STAGED): Phase.STAGED,
        (Phase.FAILED, Turn.PREPARE): Phase.PREPARING,
        (Phase.FAILED, Turn.PROGRESS): Phase.FAILED,
        (Phase.FAILED, Turn.READY): Phase.READY,
        (Phase.FAILED, Turn.ACTIVATED): Phase.FAILED,
        (Phase.FAILED, Turn.FAIL): Phase.FAILED,
        # What we stopped waiting for is gone; when to ask again stays as it was.
        (Phase.FAILED, Turn.RETIRED): Phase.FAILED,
    }
)


_LOADING = frozenset({"load", "warm"})


@dataclass(frozen=True, slots=True)
class Resident:
    """One revision inside one member.

    Attributes:
        phase: Where it is.
        step: The member's own word for it while it prepares: `fetch`, `verify`, `load` or `warm`.
        done_bytes: Progress of the step.
        total_bytes: Size of the step; 0: not known.
        weights_bytes: Memory of the weights, measured by the member; 0: not loaded.
        failure: Why it failed; empty otherwise.
        epoch: The highest epoch that we told for it; 0: none.
        attempts: How often we asked for it.
        due_s: While STAGING or PREPARING: when we stop waiting. While FAILED: when we ask again.
    """

    phase: Phase = Phase.ABSENT
    step: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    weights_bytes: int = 0
    failure: str = ""
    epoch: int = 0
    attempts: int = 0
    due_s: float = 0.0

    @property
    def loading(self) -> bool:
        """Whether it is where a process takes the memory that it may not have."""
        return self.phase is Phase.PREPARING and self.step in _LOADING

    def after(self, turn: Turn) -> Resident:
        """The same revision after `turn`.

        Raises:
            EventIllegal: The table has no such step.
        """
        phase = TABLE.get((self.phase, turn))
        if phase is None:
            raise EventIllegal(f"A revision that is {self.phase} cannot take the event {turn.value!r}.")
        return replace(self, phase=phase)
