"""The book of live jobs. Owns: what this gateway would tell a store that has lost them, job by job.

Pure bookkeeping: no call is made here. A job is in it from its submission until it is settled or withdrawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.gateway.core.jobs import Grant, Outcome, QueuedJob, and_returned
from services.gateway.core.log import LogTail

# A job that lives for a submission is known to the store as `<submission>` and, once an earlier record stands
# in its way, as `<submission>+`. The gateway's own queue knows it by the former.
ANOTHER = "+"


@dataclass(slots=True)
class LiveEntry:
    """One live job.

    Attributes:
        job: As it was submitted last, with what it has used and is pinned to since.
        submitted_s: When that was.
        grant: The slot that it runs in; None while it waits.
        told: Whether the store may have heard of it: a call was made, whatever became of that.
        at_store: What the store knows of it. None: nothing, or not all; empty: that it waits, or perhaps runs
            under a grant that nobody heard of; else the nonce under which it runs there.
        suffix: What the store knows its submission by besides.
        returned: The nonces of the latest grants that were given back.
    """

    job: QueuedJob
    submitted_s: float
    grant: Grant | None = None
    told: bool = False
    at_store: str | None = None
    suffix: str = ""
    returned: tuple[str, ...] = ()

    @property
    def at_home(self) -> bool:
        """Whether the store knows the job as it is."""
        return self.at_store == ("" if self.grant is None else self.grant.nonce)

    @property
    def stored_job(self) -> QueuedJob:
        """The job as the store knows it."""
        return replace(self.job, submission=self.job.submission + self.suffix) if self.suffix else self.job

    def aged(self, now_s: float) -> QueuedJob:
        """The job with what is left of its time; it has waited, so that no bound refuses it."""
        passed_s = now_s - self.submitted_s
        return replace(
            self.job,
            timeout_s=max(self.job.timeout_s - passed_s, 0.001),
            waited_s=max(self.job.waited_s + passed_s, 0.001),
        )

    def stored_aged(self, now_s: float) -> QueuedJob:
        """The same, as the store knows it."""
        return replace(self.aged(now_s), submission=self.stored_job.submission)

    def wants(self, grant: Grant) -> bool:
        """Whether the job waits for a slot such as `grant` lends."""
        is_new = grant.nonce not in self.returned
        return is_new and self.grant is None and self.job.pin in {"", grant.revision}

    def note_grant(self, grant: Grant, *, by_store: bool) -> None:
        """Notes the slot that the job runs in now, unless it is late news of one that was given back."""
        if grant.nonce in self.returned:
            return
        self.grant = grant
        if by_store:
            self.at_store = grant.nonce

    def note_return(self, nonce: str, pin: str, used_tokens: int, *, by_store: bool) -> None:
        """Notes that the job waits again: the revision of its text, if any, and what it has used so far."""
        self.grant, self.returned = None, and_returned(self.returned, nonce)
        self.note_text(pin, used_tokens)
        if not by_store and not self.at_store:
            # Where it waits there as well, it is not known to have begun.
            self.at_store = None

    def note_text(self, pin: str, used_tokens: int) -> None:
        """Notes which revision's text the job has, if any, and what it has used so far."""
        self.job = replace(self.job.having_used(used_tokens), pin=pin or self.job.pin)

    def rename(self) -> None:
        """Takes another submission nonce at the store: it remembers an end of the one before."""
        self.suffix += ANOTHER

    def end(self, outcome: Outcome, used_tokens: int, tail: LogTail | None) -> OwedEnd:
        """How the job has ended, for a store that has not heard of it."""
        # A store that is being told that it runs here may know the one or the other.
        nonces = dict.fromkeys(nonce for nonce in (self.at_store, self.grant and self.grant.nonce) if nonce)
        job = self.stored_job.having_used(used_tokens)
        return OwedEnd(
            job.model,
            job.job_id,
            tuple(nonces),
            job.submission,
            outcome,
            job.used_tokens,
            tail,
            job.tenant,
        )


@dataclass(frozen=True, slots=True)
class OwedEnd:
    """An end that the store has not heard of; it may know the job under any of the nonces, or as waiting."""

    model: str
    job_id: str
    nonces: tuple[str, ...]
    submission: str
    outcome: Outcome
    used_tokens: int
    # What its log lacks there, of a resumable one.
    tail: LogTail | None = None
    # Who is charged, where that is known.
    tenant: str = ""
    ended_s: float = 0.0


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
        if known is not None and known.job.submission == job.submission:
            pin, used_tokens = known.job.pin, known.job.used_tokens
            known.job, known.submitted_s = job, now_s
            known.note_text(job.pin or pin, used_tokens)
            return known
        # What has waited was accepted by the store once.
        entry = LiveEntry(job, now_s, told=job.waited_s > 0)
        self._entries[job.job_id] = entry
        return entry

    def strike(self, entry: LiveEntry) -> None:
        """Removes an entry that is in the book."""
        if self.lives(entry):
            del self._entries[entry.job.job_id]

    def running(self, job_id: str, nonce: str) -> LiveEntry | None:
        """The job that runs under `nonce`; None where that is not the grant that counts."""
        entry = self._entries.get(job_id)
        return entry if entry is not None and entry.grant is not None and entry.grant.nonce == nonce else None

    def strike_ended(self, job_id: str, nonce: str) -> LiveEntry | None:
        """Removes the job that ran under `nonce`; None where that is not the grant that counts."""
        entry = self.running(job_id, nonce)
        return None if entry is None else self._entries.pop(job_id)
