"""The log of a resumable request. Owns: what stands in it, and what reading and writing it may answer.

Data alone. The position of an event, from 1, is the cursor that a client names to go on behind it. Places in
the queue are not logged: they are news, and worth nothing later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import InterlockError
from services.gateway.core.events import Chunk, Finished, Started
from services.gateway.core.jobs import Grant, Outcome

# Every chunk has a token but the last of a sequence; besides them there is one `started` an attempt and one
# end for each sequence, of which there are four at most.
EVENTS_BESIDES_TOKENS = 64
# An event's own fields, and a token's id with its text as JSON: most need a tenth of it.
BYTES_BESIDES_TOKENS = 16_384
BYTES_PER_TOKEN = 512
# One alternative of a token: an id and a number with all its digits.
BYTES_PER_ALTERNATIVE = 64
# Starts that one gateway may count before the next one's numbers begin: a retry each 100 ms for an hour.
ADOPTION_BITS = 16


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error: the last event of its log."""

    error: InterlockError


@dataclass(frozen=True, slots=True)
class Entry:
    """One event in a log.

    Attributes:
        event: What happened.
        at_s: When, in seconds since the request was accepted.
        cached_prompt_tokens: Prompt tokens found in a cache, as far as known then.
    """

    event: Started | Chunk | Finished | Failed
    at_s: float = 0.0
    cached_prompt_tokens: int = 0

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        event = self.event
        return event.is_last if isinstance(event, Finished) else isinstance(event, Failed)


def used_tokens(entries: Sequence[Entry], prompt_tokens: int) -> int:
    """What the request of a log is charged; the prompt once a worker has said anything of it."""
    told = [entry.event for entry in entries if isinstance(entry.event, Chunk | Finished)]
    if not told:
        return 0
    return prompt_tokens + sum(len(event.token_ids) for event in told if isinstance(event, Chunk))


@dataclass(frozen=True, slots=True)
class LogTail:
    """Events that are written when a job ends.

    Attributes:
        position: How many events stand before them.
        entries: They.
    """

    position: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class LogBounds:
    """How much one log may hold."""

    events_max: int
    bytes_max: int


def log_bounds(max_tokens: int, alternatives: int | None) -> LogBounds:
    """The bounds of a request with so many tokens, of all sequences, and so many alternatives to each."""
    bytes_per_token = BYTES_PER_TOKEN + BYTES_PER_ALTERNATIVE * (1 + (alternatives or 0))
    return LogBounds(max_tokens + EVENTS_BESIDES_TOKENS, BYTES_BESIDES_TOKENS + max_tokens * bytes_per_token)


class AppendOutcome(StrEnum):
    """What became of events that were to be appended.

    WRITTEN: they stand in the log. GAP: the log ends before them; it was lost. STALE: the attempt is not
    current; the log is another gateway's. LOST: the store knows of no such job, as one that was emptied.
    FULL: the log is at its bound.
    """

    WRITTEN = "written"
    GAP = "gap"
    STALE = "stale"
    LOST = "lost"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Appended:
    """The answer to an append: `end` is the log's length where it is known."""

    outcome: AppendOutcome
    end: int = 0


@dataclass(frozen=True, slots=True)
class LogPage:
    """What stands in a log behind a position.

    Attributes:
        digest: Digest of what was asked.
        end: How many events stand in the log.
        entries: The next of them.
        outcome: How the job ended; None while it lives.
        waits: Whether it waits for a slot, without which nothing can be written.
    """

    digest: str
    end: int
    entries: tuple[Entry, ...] = ()
    outcome: Outcome | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A job that another process began, and that is this gateway's now.

    Attributes:
        payload: What was asked; see `core.payload`.
        submission: Nonce under which it is this gateway's.
        waited_s: Time since it arrived.
        left_s: Time until its deadline.
        adoptions: How often it has changed hands.
        entries: Its log.
        grant: The slot that it holds already; None: it waits.
    """

    payload: str
    submission: str
    waited_s: float
    left_s: float
    adoptions: int
    entries: tuple[Entry, ...]
    grant: Grant | None = None

    @property
    def starts(self) -> int:
        """Behind which number attempts go on: a worker may have heard those before from another process."""
        return self.adoptions << ADOPTION_BITS


class NoticeKind(StrEnum):
    """What gateways tell one another.

    LOG: events were appended. STOP: the subject wants it ended. TAKE: a leaving gateway handed it over.
    """

    LOG = "log"
    STOP = "stop"
    TAKE = "take"


@dataclass(frozen=True, slots=True)
class Notice:
    """A message about one job; it may be lost, and then what it tells is found by looking."""

    kind: NoticeKind
    job_id: str
    model: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request id stands for.

    Attributes:
        model: The model whose queue has the job.
        digest: Digest of what was asked.
    """

    model: str
    digest: str
