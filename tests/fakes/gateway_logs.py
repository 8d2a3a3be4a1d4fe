"""Logs and a directory in memory, for gateways that have no store beside them."""

# ruff: noqa: ARG002 - a fake takes what its port gives, whether it looks at it or not

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.common.errors import StoreUnavailable
from services.gateway.core.jobs import Outcome
from services.gateway.core.log import (
    Appended,
    AppendOutcome,
    Claim,
    Entry,
    Failed,
    LogBounds,
    LogPage,
    LogTail,
)


@dataclass
class FakeLogs:
    """`GenerationLog` and `RequestDirectory`; every attempt is current unless a test says otherwise.

    Attributes:
        entries: What was written, by job.
        claims: What ids stand for.
        answers: What the next appends answer instead of writing.
        appends: Positions and sizes of the appends.
        used: What the appends told of used tokens.
        down: Whether every call raises StoreUnavailable.
        waiting: Jobs that wait for a slot.
        emptied: Whether it knows nothing, and cannot be told of it again yet.
        mute: Whether an append does so, and has written all the same.
        unattended: What `unattended_s` answers.
        outcomes: How jobs ended whose logs do not say so.
    """

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    answers: list[Appended] = field(default_factory=list)
    appends: list[tuple[str, int, int]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    down: bool = False
    emptied: bool = False
    mute: bool = False
    unattended: float | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def write_tail(self, job_id: str, tail: LogTail) -> None:
        """Writes what a job's end brings."""
        self._write(job_id, tail.position, tail.entries)

    async def append(
        self,
        model: str,
        job_id: str,
        nonce: str,
        position: int,
        entries: Sequence[Entry],
        bounds: LogBounds,
        *,
        used_tokens: int = 0,
    ) -> Appended:
        """See `GenerationLog.append`."""
        self._check()
        self.used.append(used_tokens)
        self.appends.append((nonce, position, len(entries)))
        if self.answers:
            return self.answers.pop(0)
        if position > (before := len(self.entries.get(job_id, ()))):
            return Appended(AppendOutcome.GAP, before)
        end = self._write(job_id, position, entries)
        if self.mute:
            raise StoreUnavailable("no reply")
        return Appended(AppendOutcome.WRITTEN, end)

    async def read(self, model: str, job_id: str, after: int, *, known: bool = False) -> LogPage | None:
        """See `GenerationLog.read`."""
        self._check()
        if known and self.emptied:
            raise StoreUnavailable("emptied")
        entries = self.entries.get(job_id)
        if entries is None:
            return None
        outcome = self.outcomes.get(job_id)
        if entries and entries[-1].is_last:
            outcome = Outcome.FAILED if isinstance(entries[-1].event, Failed) else Outcome.FINISHED
        claim = self.claims.get(job_id)
        digest, waits = claim.digest if claim else "", job_id in self.waiting
        return LogPage(digest, len(entries), tuple(entries[after:]), outcome, waits)

    async def unattended_s(self, model: str, job_id: str) -> float | None:
        """See `GenerationLog.unattended_s`."""
        self._check()
        return self.unattended

    async def claim(self, job_id: str, claim: Claim, ttl_s: float) -> Claim | None:
        """See `RequestDirectory.claim`."""
        self._check()
        known = self.claims.get(job_id)
        self.claims.setdefault(job_id, claim)
        return known

    async def find(self, job_id: str) -> Claim | None:
        """See `RequestDirectory.find`."""
        self._check()
        return self.claims.get(job_id)

    async def release(self, job_id: str, claim: Claim) -> None:
        """See `RequestDirectory.release`."""
        self._check()
        if self.claims.get(job_id) == claim:
            del self.claims[job_id]

    def _write(self, job_id: str, position: int, entries: Sequence[Entry]) -> int:
        known = self.entries.setdefault(job_id, [])
        assert position <= len(known)
        known.extend(entries[len(known) - position :])
        return len(known)

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("gone")
