"""The ports of the gateway: what its dispatcher needs of the world, in as few verbs as it takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from services.common.conversation import Aside, Message
from services.gateway.core.attempts import AttemptEnd, Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import Finished
from services.gateway.core.jobs import Grant, Outcome, QueuedJob, Renewal, Waiting
from services.gateway.core.log import (
    Appended,
    Claim,
    Entry,
    LogBounds,
    LogPage,
    LogTail,
    Notice,
    TakenUp,
)
from services.gateway.core.params import Words
from services.gateway.core.tenancy import TenantUsage


class JobQueue(Protocol):
    """The queue that all gateways share. Every method raises StoreUnavailable when it cannot be reached.

    A job is this gateway's from `enqueue` until `settle`, `cancel` or the loss of its lease. Where it is
    entered again after a loss, or is resumable and `unclaimed`, the id that its client gave it stands for it
    from then on.
    """

    async def enqueue(self, job: QueuedJob) -> Grant | Waiting:
        """Accepts a job, and grants it a slot at once where one is free and nobody is before it.

        Raises:
            QueueFull: The model's bound or the tenant's is reached, or the job could not start before
                its deadline by the present estimate.
            QuotaExceeded: Its tokens do not fit into its tenant's minute.
            WorkersBarred: It is new, and the breakers of all workers are open.
            RequestExists: The id is in use by a job that has not ended; or this submission was
                repeated after it had finished.
            DeadlineExceeded, RequestCancelled, WorkerLost: This submission was repeated after it had
                ended so. It never runs twice.
        """
        ...

    def on_grant(self, receive: Callable[[Grant], None]) -> None:
        """Sets who hears of grants that were made by another call or another gateway.

        A grant may arrive before the call that enqueued its job has returned, and more than once.
        """
        ...

    async def renew(
        self,
        model: str,
        running: Mapping[str, str],
        waiting: frozenset[str],
        *,
        places: frozenset[str] | None = None,
        leaving: bool = False,
    ) -> Renewal:
        """Prolongs the leases of `running` (job -> nonce) and `waiting`, and grants what can be.

        Of those of `waiting` that are in `places` it tells where they stand; None: of all.
        Called every second; it is the sign of life of this gateway. The caller compares `lost` and
        `unknown` with what it knows when the answer arrives, which may be more than when it asked. A job
        that stays unnamed until its lease has passed is ended, unless it is resumable: `take_up` goes on with
        it. Such a one may be among `granted`, too, and so may one that a vanished gateway left. Once the
        caller says that it is `leaving`, other gateways hand it nothing any more.
        """
        ...

    async def settle(
        self,
        model: str,
        job_id: str,
        nonce: str,
        outcome: Outcome,
        used_tokens: int,
        tail: LogTail | None = None,
    ) -> bool:
        """Ends a granted job and frees its slot. Without effect unless the grant is current.

        What its tenant was charged, and what was reserved of its quota, is corrected to `used_tokens`, or to
        what the job had used before if that is more. Of a resumable job it writes `tail` in the same step;
        without effect, too, where the log ends before it, for the store has lost what was written.
        Returns whether it had an effect.
        """
        ...

    async def requeue(
        self, model: str, job_id: str, nonce: str, *, pin: str = "", used_tokens: int = 0
    ) -> bool:
        """Puts a job back at its old place after its worker failed.

        `pin` is the revision whose text it has, and which alone may go on; empty: what bound it before still
        does. The charge is taken back. `used_tokens` is what the job has used so far: it is charged when the
        job ends, be it while it waits. Returns whether the grant was current; if not, the job is somebody
        else's or gone.
        """
        ...

    async def refused(self, model: str, job_id: str, nonce: str, *, hold_s: float) -> bool:
        """Puts a job back that its worker refused, at no cost in attempts; the worker is held a moment."""
        ...

    async def register(self, job: QueuedJob, grant: Grant, *, instead: bool = False) -> bool:
        """Enters a job that runs already, after the queue lost it, so that its slot counts again.

        What the queue knows wins: another attempt, an end, or a namesake. Only the submission's own wait
        gives way; and with `instead` an attempt of it, too, of which the caller knows that it does not run.
        Returns whether `grant` is current now; if not, the job is somebody else's or has ended.
        """
        ...

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
        """Withdraws a submission: ends the job if it waits, or was granted without the caller's knowing.

        Its tenant is charged as by `settle`. Of a resumable job it writes `tail` in the same step. Where the
        request has come to another end, of which the queue alone has not heard, `outcome` tells it.
        """
        ...

    async def stop(self, model: str, job_id: str) -> bool:
        """Ends a job for its subject, whichever gateway has it; returns False when it had ended before.

        Raises:
            RequestUnknown: The queue does not know it.
        """
        ...

    async def reap(self, model: str) -> tuple[str, ...]:
        """Ends what vanished gateways left behind: running jobs whose lease ended, waiting ones too.

        Returns the ids of resumable ones, which are the caller's now: `take_up` tells what they are. While
        the caller is leaving they are another gateway's instead, where one stays.
        """
        ...

    async def take_up(self, model: str, job_id: str) -> TakenUp | None:
        """Tells all about a resumable job that is the caller's and unknown to it; None: there is none."""
        ...

    async def release(self, model: str, job_id: str, submission: str) -> bool:
        """Hands a resumable job to another gateway that stays; returns whether there is one.

        The caller leaves from then on. An empty `submission` names a job that came to the caller and that it
        has not taken up.
        """
        ...

    def on_notice(self, receive: Callable[[Notice], None]) -> None:
        """Sets who hears what other gateways tell about jobs."""
        ...

    async def length(self, model: str) -> int:
        """How many jobs wait."""
        ...


class UsageBook(Protocol):
    """What tenants take. Methods raise StoreUnavailable."""

    async def usage(self, model: str, tenant: str) -> TenantUsage:
        """What a tenant takes of a model now."""
        ...


class GenerationLog(Protocol):
    """The logs of resumable requests. Every method raises StoreUnavailable when they cannot be reached."""

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
        """Writes events behind the first `position` ones, if `nonce` names the attempt that runs.

        What stands there already is not written again, so that a repeated call has the same effect.
        `used_tokens` is what the job has used so far, and is charged whoever ends it.
        """
        ...

    async def read(self, model: str, job_id: str, after: int, *, known: bool = False) -> LogPage | None:
        """Reads behind the first `after` events; the caller gets a notice of later ones for a while.

        Returns None where there is no such job, or it is not resumable. Of one that is `known` to have been
        there a store that was emptied says nothing before it can be told of it again: it counts as away.
        """
        ...

    async def unattended_s(self, model: str, job_id: str) -> float | None:
        """How long ago a gateway read the log for a client; None: never, or not lately.

        A store that was emptied, and has not known the job again for long enough to say, counts as away.
        """
        ...


class RequestDirectory(Protocol):
    """What the ids of requests stand for. Every method raises StoreUnavailable."""

    async def claim(self, job_id: str, claim: Claim, ttl_s: float) -> Claim | None:
        """Lets an id stand for `claim` from now on, unless it stands for something else.

        Returns:
            What it stood for already; None: nothing.
        """
        ...

    async def find(self, job_id: str) -> Claim | None:
        """What an id stands for; None: nothing."""
        ...

    async def release(self, job_id: str, claim: Claim) -> None:
        """Frees an id that stands for `claim`."""
        ...


class BreakerBoard(Protocol):
    """What every gateway sees of this gateway's breakers. Methods raise StoreUnavailable.

    A worker listed as open gets no grant of this gateway's jobs until its sleep is over; then one grant is
    flagged `trial`, and the pair is listed as open again in the same step.
    """

    async def list_open(self, model: str, worker_id: str, sleep_s: float | None) -> None:
        """Keeps this gateway's jobs from a worker for `sleep_s`; None: until it is listed as closed."""
        ...

    async def list_closed(self, model: str, worker_id: str) -> None:
        """Lets this gateway's jobs go to a worker again."""
        ...


class SharedQueue(JobQueue, UsageBook, BreakerBoard, Protocol):
    """All faces of the one queue: what a gateway is composed of. Everything else asks for one face."""


class StoreQueue(SharedQueue, Protocol):
    """The shared queue itself, which may be away, and learns later what was done without it."""

    async def book(self, model: str, tenant: str, nonce: str, used_tokens: int, *, unless: str = "") -> None:
        """Charges a tenant's minute for what was used while the queue could not be reached.

        Once, however often it is said with the same `nonce`; not where the queue knows the job `unless`: its
        end charges it.
        """
        ...


class Tokenizer(Words, Protocol):
    """Text to token ids and back, with one model's chat template."""

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        ...

    async def encode(self, messages: Sequence[Message], aside: Aside) -> tuple[int, ...]:
        """Renders a conversation and returns its ids; special tokens typed as text stay text.

        What takes long is done `aside`, and what that raises is raised here.

        Raises:
            ArgumentInvalid: The template refuses the conversation.
        """
        ...

    async def encode_raw(self, text: str, aside: Aside) -> tuple[int, ...]:
        """The ids of a text without a template, with what the model begins its texts with."""
        ...


class AttemptSink(Protocol):
    """Who hears of one attempt. Every method returns at once; after an end nothing more is said."""

    def output(self, output: Output) -> None:
        """Tokens, and with the last of them the end."""
        ...

    def refused(self, reason: RefusalReason, message: str) -> None:
        """The worker did not take it, or has found it impossible: an end."""
        ...

    def lost(self, cause: str, loss: Loss) -> None:
        """The worker is gone, or gave the attempt up: an end."""
        ...


class Attempt(Protocol):
    """One attempt under way at a worker."""

    def add_credit(self, sequence: int, tokens: int) -> None:
        """Lets the worker send so many tokens more of a sequence."""
        ...

    def end(self, sequence: int) -> None:
        """Tells the worker that one sequence is long enough, and says nothing more of it; others go on."""
        ...

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> Awaitable[None]:
        """Tells the worker to stop, at once, and says nothing more to the sink.

        `verdict` is what the caller learned of the worker; a client's wish to stop says nothing about it.
        What is returned is done when the worker has ended it, or a moment has passed; nobody needs to wait.
        """
        ...


class WorkerPool(Protocol):
    """The workers, each behind one session that carries all its requests."""

    def start(self, worker_id: str, address: str, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """Sends an order to a worker, connecting where needed. Never fails: the sink hears of a loss."""
        ...


class Meter(Protocol):
    """Counts what becomes of requests and attempts. Every method returns at once."""

    def request_ended(self, model: str, outcome: Outcome, finished: Finished | None) -> None:
        """A request reached its end; `finished` is what its client was told after a success."""
        ...

    def first_token(self, model: str, ttft_s: float) -> None:
        """A request got its first token so long after it was accepted."""
        ...

    def attempt_ended(self, end: AttemptEnd) -> None:
        """A worker's part in a request is over."""
        ...
