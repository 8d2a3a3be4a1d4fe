"""Fakes of the gateway's ports: a tokenizer of one id a character; a pool and a queue that remember."""

# ruff: noqa: ARG002 - a fake takes what its port gives, whether it looks at it or not

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from services.common.conversation import Aside, Message
from services.common.errors import InterlockError, RequestUnknown, StoreUnavailable
from services.common.token_pieces import TokenPiece
from services.gateway.core.attempts import AttemptEnd, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import Finished
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.log import LogTail, Notice, TakenUp
from services.gateway.core.params import SamplingParams
from services.gateway.core.ports import AttemptSink

# Every character below is one token; none is special.
VOCABULARY = 0x3000


@dataclass(frozen=True)
class FakeTokenizer:
    """One token a character; a message becomes `role:content` and a line end.

    Attributes:
        letters: How often a token's character stands in the text that it becomes.
    """

    letters: int = 1

    @property
    def vocabulary(self) -> int:
        """See `Tokenizer.vocabulary`."""
        return VOCABULARY

    async def encode(self, messages: Sequence[Message], aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        rendered = "".join(f"{message.role}:{message.content}\n" for message in messages)
        return tuple(map(ord, rendered))

    async def encode_raw(self, text: str, aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode_raw`."""
        return tuple(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return "".join(chr(token_id) * self.letters for token_id in token_ids)

    def piece(self, token_id: int) -> TokenPiece:
        """See `Tokenizer.piece`."""
        return TokenPiece.of_bytes(self.decode([token_id]).encode())


@dataclass
class FakeAttempt:
    """An attempt that a test plays the worker of.

    Attributes:
        order: What was asked.
        sink: Who hears of it.
        worker_id: The worker.
        credit_tokens: The credit that it was given so far, of all sequences.
        credits: What was added to it: sequence and tokens.
        ended: The sequences that were ended alone.
        cancelled: Whether it was cancelled.
        verdict: What was learned of the worker by then.
    """

    order: WorkOrder
    sink: AttemptSink
    worker_id: str
    credit_tokens: int = 0
    credits: list[tuple[int, int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    cancelled: bool = False
    verdict: Verdict | None = None

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""
        self.credit_tokens += tokens
        self.credits.append((sequence, tokens))

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""
        self.ended.append(sequence)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> asyncio.Future[None]:
        """See `Attempt.cancel`; the worker ends it at once."""
        self.cancelled, self.verdict = True, verdict
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.set_result(None)
        return ended


@dataclass
class FakeWorkerPool:
    """Workers that do nothing by themselves.

    Attributes:
        attempts: What was started, in order.
    """

    attempts: list[FakeAttempt] = field(default_factory=list)
    _started: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> FakeAttempt:
        """See `WorkerPool.start`."""
        assert address
        attempt = FakeAttempt(order, sink, worker_id, order.credit_tokens)
        self.attempts.append(attempt)
        self._started.set()
        return attempt

    async def wait_started(self, count: int) -> FakeAttempt:
        """Returns attempt number `count`, from 1, as soon as it was started."""
        while len(self.attempts) < count:
            self._started.clear()
            await self._started.wait()
        return self.attempts[count - 1]


def grant(nonce: str, job_id: str = "j") -> Grant:
    """A grant with plain values."""
    return Grant(job_id, 1, nonce, "w1", "127.0.0.1:1", "r1", 1)


@dataclass
class FakeQueue:
    """A queue that remembers what it was told and fails on cue.

    Attributes:
        calls: Verb and nonce (or submission) of each call.
        answer: What `enqueue` answers; None: a grant of its own.
        answers_on: What `enqueue` waits for before it answers; None: nothing.
        down: Whether every call raises StoreUnavailable.
        registers: What `register` answers.
        renewal: What the next `renew` answers.
        places: The jobs whose places the latest `renew` asked for.
        leaving: Whether the latest `renew` said that its gateway leaves.
        settles: What `settle` answers.
        releases: What `release` answers.
        taken: What `take_up` tells, by job.
        tails: The tails of logs that ends of jobs brought.
        used: What requeues and withdrawals told of used tokens.
        settled: What ends told of them.
        outcomes: How withdrawals said that their requests ended.
        pins: What each `enqueue`, `requeue` and `register` told of the text's revision.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    answer: Grant | Waiting | InterlockError | None = None
    answers_on: asyncio.Event | None = None
    down: bool = False
    registers: bool = True
    renewal: Renewal = field(default_factory=Renewal)
    places: frozenset[str] | None = None
    leaving: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    receive: Callable[[Grant], None] = lambda _: None
    tell: Callable[[Notice], None] = lambda _: None
    settles: bool = True
    releases: bool = True
    taken: dict[str, TakenUp] = field(default_factory=dict)
    tails: list[LogTail | None] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    pins: list[str] = field(default_factory=list)

    def note(self, verb: str, name: str) -> None:
        """Remembers a call, or fails."""
        self.changed.set()
        if self.down:
            raise StoreUnavailable("gone")
        self.calls.append((verb, name))

    async def wait_for(self, verb: str, name: str) -> None:
        """Returns once a call was made."""
        async with asyncio.timeout(5):
            while (verb, name) not in self.calls:
                self.changed.clear()
                await self.changed.wait()

    def on_grant(self, receive: Callable[[Grant], None]) -> None:
        """See `JobQueue.on_grant`."""
        self.receive = receive

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """See `JobQueue.enqueue`."""
        self.note("enqueue", job.submission)
        self.pins.append(job.pin)
        if self.answers_on is not None:
            await self.answers_on.wait()
        if isinstance(self.answer, InterlockError):
            raise self.answer
        return self.answer or grant(f"n{len(self.calls)}", job.job_id)

    async def renew(
        self,
        model: str,
        running: Mapping[str, str],
        waiting: frozenset[str],
        *,
        places: frozenset[str] | None = None,
        leaving: bool = False,
    ) -> Renewal:
        """See `JobQueue.renew`."""
        self.note("renew", ",".join([*running, *waiting]))
        self.places, self.leaving = places, leaving
        renewal, self.renewal = self.renewal, Renewal()
        return renewal

    async def settle(
        self,
        model: str,
        job_id: str,
        nonce: str,
        outcome: Outcome,
        used_tokens: int,
        tail: LogTail | None = None,
    ) -> bool:
        """See `JobQueue.settle`."""
        self.settled.append(used_tokens)
        self.tails.append(tail)
        self.note(f"settle:{outcome}", nonce)
        return self.settles

    async def requeue(
        self, model: str, job_id: str, nonce: str, *, pin: str = "", used_tokens: int = 0
    ) -> bool:
        """See `JobQueue.requeue`."""
        self.used.append(used_tokens)
        self.note("requeue", nonce)
        self.pins.append(pin)
        return True

    async def refused(self, model: str, job_id: str, nonce: str, *, hold_s: float) -> bool:
        """See `JobQueue.refused`."""
        self.note("refused", nonce)
        return True

    async def register(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """See `JobQueue.register`."""
        self.note("register", grant.nonce)
        self.pins.append(job.pin)
        return self.registers

    async def cancel(
        self,
        model: str,
        job_id: str,
        submission: str,
        tail: LogTail | None = None,
        *,
        used_tokens: int = 0,
        outcome: Outcome = Outcome.CANCELLED,
    ) -> None:
        """See `JobQueue.cancel`."""
        self.used.append(used_tokens)
        self.outcomes.append(outcome)
        self.tails.append(tail)
        self.note("cancel", submission)

    async def stop(self, model: str, job_id: str) -> bool:
        """See `JobQueue.stop`."""
        self.note("stop", job_id)
        raise RequestUnknown("nowhere")

    async def take_up(self, model: str, job_id: str) -> TakenUp | None:
        """See `JobQueue.take_up`."""
        self.note("take_up", job_id)
        return self.taken.pop(job_id, None)

    async def release(self, model: str, job_id: str, submission: str) -> bool:
        """See `JobQueue.release`."""
        self.note("release", submission)
        return self.releases

    def on_notice(self, receive: Callable[[Notice], None]) -> None:
        """See `JobQueue.on_notice`."""
        self.tell = receive

    async def reap(self, model: str) -> tuple[str, ...]:
        """See `JobQueue.reap`."""
        self.note("reap", model)
        return ()

    async def length(self, model: str) -> int:
        """See `JobQueue.length`."""
        return 0


@dataclass
class FakeMeter:
    """Remembers what it was told."""

    requests: list[tuple[str, Outcome, Finished | None]] = field(default_factory=list)
    first_tokens: list[tuple[str, float]] = field(default_factory=list)
    attempts: list[AttemptEnd] = field(default_factory=list)

    def request_ended(self, model: str, outcome: Outcome, finished: Finished | None) -> None:
        """See `Meter.request_ended`."""
        self.requests.append((model, outcome, finished))

    def first_token(self, model: str, ttft_s: float) -> None:
        """See `Meter.first_token`."""
        self.first_tokens.append((model, ttft_s))

    def attempt_ended(self, end: AttemptEnd) -> None:
        """See `Meter.attempt_ended`."""
        self.attempts.append(end)


def work_order(job_id: str = "j", *, max_tokens: int = 9, credit_tokens: int = 8) -> WorkOrder:
    """The first attempt at a job of one sequence."""
    return WorkOrder(
        job_id=job_id,
        attempt=1,
        request_id="q",
        model="m",
        revision="r1",
        epoch=1,
        prompt_ids=(1,),
        emitted=((),),
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        credit_tokens=credit_tokens,
    )
