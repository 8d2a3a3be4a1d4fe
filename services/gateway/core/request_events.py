"""What happens to a request, and what must be done about it. Data alone; `core.request` ties the two."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import InterlockError
from services.gateway.core.attempts import RefusalReason
from services.gateway.core.jobs import Grant, Outcome

# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The queue lent it a slot."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The queue does not know that it waits."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The queue would not take it back."""

    error: InterlockError


@dataclass(frozen=True, slots=True)
class Progressed:
    """The worker sent tokens, or told the end of a sequence."""


# Told with every token.
PROGRESSED = Progressed()


@dataclass(frozen=True, slots=True)
class Completed:
    """The worker ended the sequence as it should."""


@dataclass(frozen=True, slots=True)
class StopReached:
    """The text met a stop string, which the worker cannot know."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker did not take it, or found out later that the request is to blame.

    `message` says why to the client then.
    """

    reason: RefusalReason
    message: str = ""


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """The worker went away, fell silent or broke the protocol.

    Attributes:
        crashed: Whether its process, or the job in it, came to an end; silence may be a busy machine's.
    """

    crashed: bool


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The queue has given its slot, or its place, to somebody else."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The client does not want it any more, or does not read."""

    error: InterlockError


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """Its time is over."""


@dataclass(frozen=True, slots=True)
class WaitedOut:
    """The time is over in which a worker that is away may come back, or be struck off."""


RequestEvent = (
    Granted
    | Forgotten
    | Rejected
    | Progressed
    | Completed
    | StopReached
    | Refused
    | AttemptLost
    | LeaseLost
    | Withdrawn
    | DeadlinePassed
    | WaitedOut
)

# --- effects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Ask the granted worker; `number` tells this start from every earlier one."""

    grant: Grant
    number: int


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    """Tell the worker to stop."""


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Put it into the queue once more, under the same submission."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take it out of the queue, where it waits."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """Give the slot back and wait at the old place."""

    grant: Grant
    emitted: bool


@dataclass(frozen=True, slots=True)
class Decline:
    """Give a refused slot back; the worker is held for a moment."""

    grant: Grant
    hold_s: float


@dataclass(frozen=True, slots=True)
class Settle:
    """Give the slot back for good."""

    grant: Grant
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class AwaitWorker:
    """Send `WaitedOut` when the time is over that an absent worker may take to come back."""


@dataclass(frozen=True, slots=True)
class Close:
    """Tell the client: None is success."""

    error: InterlockError | None


Effect = StartAttempt | CancelAttempt | Enqueue | Withdraw | Requeue | Decline | Settle | AwaitWorker | Close
