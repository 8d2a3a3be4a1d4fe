"""What a load measurement notes of each request. Owns: how requests end; knows no wire and no clock."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Fate(enum.Enum):
    """How a request ended."""

    CUT = "cut"
    """The measurement ended before it."""
    FINISHED = "finished"
    """It was answered to the end."""
    REFUSED = "refused"
    """It was turned away before it started."""
    MISSED = "missed"
    """Its deadline passed, or could not be met any more."""
    FAILED = "failed"
    """Anything else."""


@dataclass(slots=True)
class Trace:
    """One request, as its client saw it. Times are of one monotonic clock, in seconds.

    Attributes:
        tenant: Who asked.
        wished_s: When its client first asked for this answer; earlier than `began_s` after refusals.
        began_s: When this attempt began.
        deadline_s: How long it may take; None: as long as the mesh allows.
        arrivals: When tokens came, and how many.
        told_wait: When a wait was first estimated, and the estimate.
        started_s: When a worker took it.
        ended_s: When it ended.
        fate: How it ended.
        retry_after_s: When the refusal said to come back, in seconds from then; None: it did not say.
    """

    tenant: str
    wished_s: float
    began_s: float
    deadline_s: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    told_wait: tuple[float, float] | None = None
    started_s: float | None = None
    ended_s: float | None = None
    fate: Fate = Fate.CUT
    retry_after_s: float | None = None

    def wait_told(self, now_s: float, wait_s: float) -> None:
        """Notes the first estimate; later ones correct it, and it is the first that a client plans by."""
        if self.told_wait is None:
            self.told_wait = (now_s, wait_s)

    def end(self, now_s: float, fate: Fate, retry_after_s: float | None = None) -> None:
        """Notes the end. An answer that came after its deadline has missed it, whoever noticed."""
        late = self.deadline_s is not None and now_s - self.began_s > self.deadline_s
        self.fate = Fate.MISSED if fate is Fate.FINISHED and late else fate
        self.ended_s, self.retry_after_s = now_s, retry_after_s

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return sum(count for _, count in self.arrivals)
