"""The book of live jobs. Owns: what this gateway would tell a store that has lost them, job by job.

Pure bookkeeping: no call is made here. A job is in it from its submission until it is settled or withdrawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.gateway.core.jobs import Grant, Outcome, QueuedJob

# A job that lives for a submission is known to the store as `<submission>` and, once an earlier record stands
# in its way, as `<submission>+`.
ANOTHER = "+"


@dataclass(slots=True)
class LiveEntry:
    """One live job.

    Attributes:
        job: As it was submitted last.
        submitted_s: When that was.
        grant: The slot that it runs in; None while it waits.
        emitted: Whether its last requeue pinned it.
        at_store: What the store may know of it: None: nothing; empty: that it waits, or perhaps runs under a
            grant that nobody heard of; else the nonce under which it runs there.
    """

    job: QueuedJob
    submitted_s: float
    grant: Grant | None = None
    emitted: bool = False
    at_store: str | None = None

    @property
    def at_home(self) -> bool:
        """Whether the store knows the job as it is."""
        return self.at_store == ("" if self.grant is None else self.grant.nonce)

    def aged(self, now_s: float) -> QueuedJob:
        """The job with what is left of its time; it has waited, so that no bound refuses it."""
        passed_s = now_s - self.submitted_s
        return replace(
            self.job,
            timeout_s=max(self.job.timeout_s - passed_s, 0.001),
            waited_s=max(self.job.waited_s + passed_s, 0.001),
        )

    def note_used(self, tokens: int) -> None:
        """Notes what the job has used so far."""
        self.job = self.job.having_used(tokens)

    def rename(self) -> None:
        """Takes another submission nonce: the store remembers an end of the one before."""
        self.job = replace(self.job, submission=self.job.submission + ANOTHER)


@dataclass(frozen=True, slots=True)
class OwedEnd:
    """An end that the store has not heard of; `nonce` is empty where the job was withdrawn."""

    model: str
    job_id: str
    nonce: str
    submission: str
    outcome: Outcome
    used_tokens: int


class JobBook:
    """All live jobs by their ids. Bounded by the requests that the gateway takes."""

    def __init__(self) -> None:
        self._entries: dict[str, LiveEntry] = {}

    def __iter__(self) -> Iterator[LiveEntry]:
        return iter(tuple(self._entries.values()))

    def find(self, job_id: str) -> LiveEntry | None:
        """The entry of a job."""
        return self._entries.get(job_id)

    def lives(self, entry: LiveEntry) -> bool:
        """Whether the entry is still in the book."""
        return self._entries.get(entry.job.job_id) is entry

    def write(self, job: QueuedJob, now_s: float) -> LiveEntry:
        """Enters a submission, or the repetition of one, which keeps what is known of it."""
        known = self._entries.get(job.job_id)
        if known is not None and known.job.submission.rstrip(ANOTHER) == job.submission:
            known.job, known.submitted_s = replace(job, submission=known.job.submission), now_s
            return known
        entry = LiveEntry(job, now_s)
        self._entries[job.job_id] = entry
        return entry

    def strike(self, entry: LiveEntry) -> None:
        """Removes an entry that is in the book."""
        if self.lives(entry):
            del self._entries[entry.job.job_id]

    def note_grant(self, grant: Grant) -> None:
        """Notes the slot that a job runs in now."""
        entry = self._entries.get(grant.job_id)
        if entry is not None:
            entry.grant = grant

    def strike_ended(self, job_id: str, nonce: str) -> LiveEntry | None:
        """Removes the job that ran under `nonce`; None where that is not the grant that counts."""
        entry = self._entries.get(job_id)
        if entry is None or entry.grant is None or entry.grant.nonce != nonce:
            return None
        return self._entries.pop(job_id)
