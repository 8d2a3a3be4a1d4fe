"""Sessions. Owns: one gateway's jobs inside the engine, from their start to their last word.

Lives on the event loop. Knows neither the step thread nor the stream that carries its words.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

from services.common import logs
from services.common.errors import InterlockError
from services.worker.core.admission import CREDIT_TOKENS_MAX, JobStart, Reason, Refusal
from services.worker.core.format import FormatBusy
from services.worker.core.outbox import Letter, Outbox, OutboxFull
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart
from services.worker.core.stepper import AddCredit, Admit, Cancel, Command, Pulse
from services.worker.core.turns import Turns


class Host(Protocol):
    """What a session needs of its engine."""

    @property
    def pulse(self) -> Pulse:
        """What is carried now."""
        ...

    def judge(self, job: JobStart) -> Refusal | None:
        """Why a job cannot be taken, as far as is known before its turn."""
        ...

    async def constrained(self, job: JobStart) -> JobStart:
        """The job with the constraint that its format asks for."""
        ...

    def post(self, command: Command) -> None:
        """Hands a command to the step thread."""
        ...

    def note_idle(self) -> None:
        """The session has nothing left to do or to say."""
        ...

    def forget(self, session: EngineSession) -> None:
        """Lets a closed session's sequences end."""
        ...


@dataclass(slots=True)
class _Job:
    """A job under way.

    Attributes:
        key: Its name.
        request_id: The client's id, for the log.
        revision: Who answers.
        open: Its sequences that have not ended, by their numbers.
        begun: Those of them that have told a token.
        tokens: Its tokens so far, of all sequences.
        compiling: Compiles its format; None once the step thread has the job.
        credit: What was added meanwhile, by sequence.
        grants: The most credit that was added at once, by sequence.
    """

    key: SequenceKey
    request_id: str
    revision: str
    open: dict[int, SequenceStart]
    begun: set[int] = field(default_factory=set)
    tokens: int = 0
    compiling: asyncio.Task[None] | None = None
    credit: Counter[int] = field(default_factory=Counter)
    grants: dict[int, int] = field(default_factory=dict)


class EngineSession:
    """One gateway's jobs. Made by `Engine.open_session`."""

    def __init__(self, number: int, engine: Host) -> None:
        self._number = number
        self._engine = engine
        self._jobs: dict[str, _Job] = {}
        self._outbox = Outbox()
        self._turns = Turns()
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._closed = False

    @property
    def number(self) -> int:
        """Names the session within this process."""
        return self._number

    @property
    def idle(self) -> bool:
        """Whether no job runs and everything was taken for writing."""
        return not self._jobs and self._outbox.empty

    @property
    def paused_jobs(self) -> int:
        """Sequences that wait for credit."""
        return self._engine.pulse.paused.get(self._number, 0)

    def start(self, job: JobStart) -> None:
        """Begins a job, or lets the outbox say why not. A later attempt replaces an earlier one."""
        if self._closed:
            # Its end is before this in the mailbox: what began now would keep its slot for good.
            return
        key = job.key
        refusal = self._engine.judge(job)
        earlier = self._jobs.get(key.job)
        if refusal is None and earlier is not None and earlier.key.attempt >= key.attempt:
            refusal = Refusal(key, Reason.INVALID, "The job runs already.")
        if refusal is not None:
            self.refuse(refusal)
            return
        if earlier is not None:
            self._end(earlier)
        sequences = {start.key.sequence: start for start in job.starts}
        self._jobs[key.job] = known = _Job(key, job.request_id, job.revision, sequences)
        if job.form is None:
            self._engine.post(Admit(job))
        else:
            known.compiling = asyncio.create_task(self._compile(job, known), name=f"format-{key.job}")

    def add_credit(self, job: str, sequence: int, tokens: int) -> None:
        """Lets one sequence of a job run on; unknown ones are ignored."""
        known = self._jobs.get(job)
        if known is None or sequence not in known.open:
            return
        known.grants[sequence] = max(known.grants.get(sequence, 0), tokens)
        if known.compiling is not None:
            known.credit[sequence] = min(known.credit[sequence] + tokens, CREDIT_TOKENS_MAX)
        else:
            self._engine.post(AddCredit(known.open[sequence].key, min(tokens, CREDIT_TOKENS_MAX)))

    def coalesce(self, hold_ms: int) -> None:
        """Lets tokens wait for those of later steps, so many milliseconds; 0: for none."""
        self._turns.hold_ms(hold_ms)
        if not hold_ms:
            self._turn()

    def cancel(self, job: str, sequence: int | None = None) -> None:
        """Ends a job, or one sequence of it; unknown ones are ignored."""
        known = self._jobs.get(job)
        if known is None:
            return
        if sequence is None or known.open.keys() == {sequence}:
            self._end(known)
        elif sequence in known.open:
            self._end_sequence(known, known.open[sequence])

    async def receive(self) -> Letter | None:
        """Waits for something to write; None when the session was closed."""
        while self._outbox.empty and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        letter = None if self._outbox.empty else self._outbox.take()
        if self.idle:
            self._engine.note_idle()
        return letter

    def refuse(self, refusal: Refusal) -> None:
        """Tells that a job is not taken; one of the same name that runs goes on."""
        logs.get_logger().debug("job.refused", job=refusal.key.job, reason=refusal.reason.value)
        try:
            self._outbox.put_refusal(refusal)
        except OutboxFull:
            self.close()
        self._wake.set()

    def put(self, event: Output | Refusal) -> None:
        """Takes in what the step thread has to say; `wake` lets the writer know."""
        key = event.key
        job = self._jobs.get(key.job)
        current = job if job is not None and job.key.attempt == key.attempt else None
        if isinstance(event, Refusal):
            self.refuse(event)
            if current is not None:
                # Where too many refusals wait unread, the session has been closed, and forgot its jobs.
                self._jobs.pop(key.job, None)
            return
        if tokens_max := self._held_tokens_max(event, current):
            self._outbox.hold(event, tokens_max)
        else:
            self._outbox.put_output(event)
        if current is not None:
            current.tokens += len(event.token_ids)
            if event.finish is None:
                current.begun.add(key.sequence)
                return
            current.open.pop(key.sequence, None)
            if not current.open:
                self._log(current, Reason.INVALID.value if event.flaw else event.finish.value)
                del self._jobs[key.job]

    def wake(self) -> None:
        """Lets the writer look into the outbox, and what is held back wait for its turn."""
        if self._outbox.holds:
            loop = asyncio.get_running_loop()
            if self._turns.is_due(loop.time()):
                self._turn()
            elif self._timer is None:
                self._timer = loop.call_later(self._turns.wait_s(loop.time()), self._turn)
        if not self._outbox.empty:
            self._wake.set()

    def close(self) -> None:
        """Cancels every job. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._turn()
        for job in self._jobs.values():
            self._log(job, "ABANDONED")
            if job.compiling is not None:
                job.compiling.cancel()
        self._jobs.clear()
        self._engine.forget(self)
        self._wake.set()

    def _held_tokens_max(self, event: Output, job: _Job | None) -> int:
        """Tokens of its sequence that may be held back together; 0: none. A first one is not, nor an end."""
        if not self._turns.hold_s or event.finish is not None or job is None:
            return 0
        start = job.open.get(event.key.sequence) if event.key.sequence in job.begun else None
        if start is None:
            return 0
        # The sequence shall never pause because its tokens wait here. One that went on with the little credit
        # that its client had left is given more by and by.
        credit_tokens = max(start.credit_tokens, job.grants.get(event.key.sequence, 0))
        return max(1, credit_tokens // 4)

    def _turn(self) -> None:
        """Tells what is held back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._turns.take(asyncio.get_running_loop().time())
        self._outbox.release()
        self._wake.set()

    async def _compile(self, job: JobStart, known: _Job) -> None:
        """Gives the job to the step thread once its format is compiled, or refuses it."""
        reason, message = Reason.INVALID, ""
        try:
            ready = await self._engine.constrained(job)
        except FormatBusy:
            reason = Reason.BUSY
        except InterlockError as error:
            message = error.message
        except Exception:  # noqa: BLE001 - the gateway must hear of the job's end, whatever it was
            logs.get_logger().error("format.crashed", job=known.key.job, exc_info=True)
            message = "format: the worker could not compile it."
        else:
            self._admit(ready, known)
            return
        self.put(Refusal(known.key, reason, message))

    def _admit(self, job: JobStart, known: _Job) -> None:
        if self._closed:
            return
        known.compiling = None
        # Some may have been cancelled meanwhile.
        starts = tuple(start for start in job.starts if start.key.sequence in known.open)
        try:
            self._engine.post(Admit(replace(job, starts=starts)))
            for sequence, tokens in known.credit.items():
                self.add_credit(known.key.job, sequence, tokens)
        except InterlockError:
            # Nobody awaits this: a thread that takes no commands ends the session, as it does elsewhere.
            self.close()

    def _end(self, known: _Job) -> None:
        if known.compiling is not None:
            known.compiling.cancel()
        for start in tuple(known.open.values()):
            self._end_sequence(known, start)

    def _end_sequence(self, known: _Job, start: SequenceStart) -> None:
        if known.compiling is None:
            self._engine.post(Cancel(start.key))
            return
        self.put(Output(start.key, len(start.emitted_ids), finish=Finish.CANCELLED))
        self.wake()

    def _log(self, job: _Job, outcome: str) -> None:
        logs.get_logger().info(
            "job.finished",
            request_id=job.request_id,
            job=job.key.job,
            attempt=job.key.attempt,
            revision=job.revision,
            tokens=job.tokens,
            outcome=outcome,
        )
