"""Resumption. Owns: what request ids stand for, and the clients that follow logs at this gateway.

Must not know: the life of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from services.common.clock import Clock
from services.common.errors import (
    ArgumentInvalid,
    InterlockError,
    QueueFull,
    RequestUnknown,
    StoreUnavailable,
)
from services.gateway.core.log import Claim
from services.gateway.core.log_errors import lost_log
from services.gateway.core.params import GenerationJob, Words
from services.gateway.core.ports import GenerationLog, RequestDirectory
from services.gateway.core.queue_errors import exists_with_other_body
from services.gateway.dispatcher.follower import Follower
from services.gateway.dispatcher.generation import Generation

# Whoever follows most leaves half of the places to the others.
SHARE_MAX = 0.5
# A request is put to its queue as soon as its id is claimed, and such a call gives up after this.
CLAIM_SETTLES_S = 2.0
# So many requests are remembered whose clients here know positions that their logs have not.
TORN_MAX = 1_024
# A client may be served by somebody else within this.
RETRY_WHEN_FULL_S = 1.0


class Claimed(Enum):
    """Whether an id stands for a request. NOT: it has no digest, or the store does not answer."""

    NOW = auto()
    BEFORE = auto()
    NOT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumptionLimits:
    """Bounds of resumption; the settings of the same names say why.

    Attributes:
        followers_max: Most clients that follow logs at this gateway.
        client_stall_s: How long a client may leave an event unread.
        resume_ttl_s: How long a log outlives its request.
        record_ttl_s: How long the queue remembers how another request ended.
    """

    followers_max: int = 4_096
    client_stall_s: float = 30.0
    resume_ttl_s: float = 600.0
    record_ttl_s: float = 60.0

    @property
    def tenant_followers_max(self) -> int:
        """Most of them that are of one tenant."""
        return math.ceil(self.followers_max * SHARE_MAX)


class Resumption:
    """Claims ids and lets clients follow logs.

    Args:
        log: The logs in the store.
        directory: What ids stand for.
        clock: Measures.
        words: A model's way back to text; None where it is not served here.
        limits: Bounds.
    """

    def __init__(
        self,
        log: GenerationLog,
        directory: RequestDirectory,
        clock: Clock,
        words: Callable[[str], Words | None],
        limits: ResumptionLimits,
    ) -> None:
        self.log = log
        self.words = words
        self._directory = directory
        self._clock = clock
        self._limits = limits
        self._followers: dict[str, set[Follower]] = {}
        # By tenant; those that have none are not in it.
        self._following: Counter[str] = Counter()
        # How much of a log holds, by job.
        self._torn: OrderedDict[str, int] = OrderedDict()

    @property
    def following(self) -> int:
        """Clients that follow a log here."""
        return self._following.total()

    async def claim(self, job: GenerationJob) -> tuple[Claimed, str]:
        """Lets the request's id stand for it; returns whether it does, since when, and which model answers.

        Raises:
            RequestExists: It stands for something else.
        """
        if not job.digest:
            return Claimed.NOT, job.model
        kept_s = self._limits.resume_ttl_s if job.resumable else self._limits.record_ttl_s
        try:
            known = await self._directory.claim(job.job_id, _claim_of(job), job.timeout_s + kept_s)
        except StoreUnavailable:
            # The queue knows by itself whether it can do without the store.
            return Claimed.NOT, job.model
        if known is not None and known.digest != job.digest:
            raise exists_with_other_body()
        if known is None:
            self._torn.pop(job.job_id, None)
        return (Claimed.NOW, job.model) if known is None else (Claimed.BEFORE, known.model)

    async def claim_instead(self, job: GenerationJob, model: str) -> tuple[Claimed, str]:
        """Lets the request's id stand for it, and no more for the same one of another model; see `claim`."""
        with contextlib.suppress(StoreUnavailable):
            await self._directory.release(job.job_id, Claim(model, job.digest))
        return await self.claim(job)

    async def release(self, job: GenerationJob) -> None:
        """Lets an id be used again, of a request that was not accepted, or ended and cannot be resumed."""
        if job.digest:
            # Its time ends by itself.
            with contextlib.suppress(StoreUnavailable):
                await self._directory.release(job.job_id, _claim_of(job))

    async def find(self, job_id: str) -> Claim | None:
        """What an id stands for."""
        return await self._directory.find(job_id)

    def check_room(self, tenant: str) -> None:
        """Refuses where no client more of a tenant can follow.

        Raises:
            QueueFull: This gateway carries as many as it may, of all tenants or of this one.
        """
        most = self._limits.tenant_followers_max
        if self._following[tenant] >= most:
            raise QueueFull(
                f"{most} clients of this subject follow resumable requests at this gateway already.",
                retry_after_s=RETRY_WHEN_FULL_S,
            )
        if self.following >= self._limits.followers_max:
            raise QueueFull(
                f"This gateway carries {self._limits.followers_max} followers already.",
                retry_after_s=RETRY_WHEN_FULL_S,
            )

    def follow_here(self, generation: Generation, cursor: int) -> Follower:
        """A client of a request that runs at this gateway.

        It may have seen, at another one, what the store took here without a word: it waits for the next try.

        Raises:
            ArgumentInvalid: The log is shorter than `cursor`, also with what is on its way there.
            QueueFull: See `check_room`.
            WorkerLost: So is the log of a request that was taken up here: the gateway before told more of it
                than it could write. And see `note_moved`.
        """
        assert generation.chronicle is not None
        self._check_torn(generation.job.job_id, cursor)
        journal = generation.chronicle.journal
        if cursor > generation.chronicle.said:
            if generation.chronicle.is_taken_up:
                raise lost_log()
            raise ArgumentInvalid(f"cursor: the log has {len(journal.entries)} events.")
        attendance = generation.attendance

        job = generation.job
        follower = self._add(job.tenant, job.model, job.job_id, cursor)
        attendance.come()
        follower.allowance = generation.allowance
        follower.read_journal(journal, attendance.go)
        return follower

    async def follow(self, tenant: str, model: str, job_id: str, cursor: int, digest: str = "") -> Follower:
        """A client, of a tenant, of a request that runs, or ended, anywhere.

        Raises:
            RequestUnknown: There is no such resumable request.
            RequestExists: It was asked something else than `digest` says.
            QueueFull: See `check_room`.
            WorkerLost: See `note_moved`.
        """
        self._check_torn(job_id, cursor)
        follower = self._add(tenant, model, job_id, cursor)
        try:
            await follower.read_store(digest)
        except BaseException:
            await follower.aclose()
            raise
        return follower

    async def follow_known(self, job: GenerationJob, model: str) -> Follower | None:
        """A client of what a resumable request's id stands for, by a model; None: nothing of it is left.

        Where that is another model than is asked now, no queue is going to recognise the request as its own.
        Whoever has claimed the id a moment ago is given the time to tell that model's queue.

        Raises:
            RequestExists, QueueFull: See `follow`.
        """
        for pause_s in (0.0,) if model == job.model else (0.0, CLAIM_SETTLES_S):
            await asyncio.sleep(pause_s)
            with contextlib.suppress(RequestUnknown):
                return await self.follow(job.tenant, model, job.job_id, 0, job.digest)
        return None

    def welcome(self, generation: Generation) -> None:
        """Lets clients here that read the store read a request at hand which this gateway has taken up.

        Nobody tells them of events any more: what a gateway writes it tells other ones alone. One that has
        read what the log has not is left to the store, as before.
        """
        chronicle, attendance = generation.chronicle, generation.attendance
        assert chronicle is not None
        for follower in self._followers.get(generation.job.job_id, ()):
            if follower.continues_in(chronicle.journal):
                attendance.come()
                follower.read_journal(chronicle.journal, attendance.go)

    def note_moved(self, generation: Generation) -> None:
        """Remembers how much of its log holds for a request that has gone to another gateway.

        What was told beyond it, while the store was away, that gateway may say otherwise: whoever has seen it
        cannot go on behind it.
        """
        chronicle = generation.chronicle
        if chronicle is not None and chronicle.is_torn:
            self._torn[generation.job.job_id] = chronicle.written
            if len(self._torn) > TORN_MAX:
                self._torn.popitem(last=False)

    def notice(self, job_id: str) -> None:
        """A log has grown."""
        for follower in self._followers.get(job_id, ()):
            follower.notice()

    def end(self, job_id: str, error: InterlockError) -> None:
        """Ends the followers of one request, which itself goes on."""
        for follower in tuple(self._followers.get(job_id, ())):
            follower.end(error)

    def end_all(self, error: InterlockError) -> None:
        """Ends every follower; the requests go on."""
        for job_id in tuple(self._followers):
            self.end(job_id, error)

    def _check_torn(self, job_id: str, cursor: int) -> None:
        if cursor > self._torn.get(job_id, cursor):
            raise lost_log()

    def _add(self, tenant: str, model: str, job_id: str, cursor: int) -> Follower:
        self.check_room(tenant)
        drop, stall_s = partial(self._drop, tenant), self._limits.client_stall_s
        follower = Follower(model, job_id, cursor, self.log, self._clock, stall_s, drop)
        self._following[tenant] += 1
        self._followers.setdefault(job_id, set()).add(follower)
        return follower

    def _drop(self, tenant: str, follower: Follower) -> None:
        self._following[tenant] -= 1
        if not self._following[tenant]:
            del self._following[tenant]
        followers = self._followers[follower.job_id]
        followers.discard(follower)
        if not followers:
            del self._followers[follower.job_id]


def _claim_of(job: GenerationJob) -> Claim:
    return Claim(job.model, job.digest)
