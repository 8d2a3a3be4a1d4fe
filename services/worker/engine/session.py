"""Sessions. Owns: one gateway's jobs inside the engine, from their start to their last word.

Lives on the event loop. Knows neither the step thread nor the stream that carries its words.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from services.common import logs
from services.worker.core.admission import CREDIT_TOKENS_MAX, JobStart, Reason, Refusal
from services.worker.core.outbox import Letter, Outbox, OutboxFull
from services.worker.core.sequence import Output, SequenceKey
from services.worker.core.stepper import AddCredit, Admit, Cancel, Command, Pulse


class Host(Protocol):
    """What a session needs of its engine."""

    @property
    def pulse(self) -> Pulse:
        """What is carried now."""
        ...

    def judge(self, job: JobStart) -> Refusal | None:
        """Why a job cannot be taken, as far as is known before its turn."""
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
    """A job that runs: its key, the client's id for the log, and its tokens so far."""

    key: SequenceKey
    request_id: str
    revision: str
    tokens: int = 0


class EngineSession:
    """One gateway's jobs. Made by `Engine.open_session`."""

    def __init__(self, number: int, engine: Host) -> None:
        self._number = number
        self._engine = engine
        self._jobs: dict[str, _Job] = {}
        self._outbox = Outbox()
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
        """Jobs that wait for credit."""
        return self._engine.pulse.paused.get(self._number, 0)

    def start(self, job: JobStart) -> None:
        """Begins a job, or lets the outbox say why not. A later attempt replaces an earlier one."""
        key = job.start.key
        refusal = self._engine.judge(job)
        earlier = self._jobs.get(key.job)
        if refusal is None and earlier is not None and earlier.key.attempt >= key.attempt:
            refusal = Refusal(key, Reason.INVALID, "The job runs already.")
        if refusal is not None:
            self.refuse(refusal)
            return
        if earlier is not None:
            self._engine.post(Cancel(earlier.key))
        self._engine.post(Admit(job))
        self._jobs[key.job] = _Job(key, job.request_id, job.revision)

    def add_credit(self, job: str, tokens: int) -> None:
        """Lets a job run on; unknown ones are ignored."""
        if (known := self._jobs.get(job)) is not None:
            self._engine.post(AddCredit(known.key, min(tokens, CREDIT_TOKENS_MAX)))

    def cancel(self, job: str) -> None:
        """Ends a job; unknown ones are ignored."""
        if (known := self._jobs.get(job)) is not None:
            self._engine.post(Cancel(known.key))

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
        job = self._jobs.get(event.key.job)
        current = job if job is not None and job.key == event.key else None
        if isinstance(event, Refusal):
            self.refuse(event)
            if current is not None:
                del self._jobs[event.key.job]
            return
        self._outbox.put_output(event)
        if current is not None:
            current.tokens += len(event.token_ids)
            if event.finish is not None:
                self._log(current, event.finish.value)
                del self._jobs[event.key.job]

    def wake(self) -> None:
        """Lets the writer look into the outbox."""
        self._wake.set()

    def close(self) -> None:
        """Cancels every job. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs.values():
            self._log(job, "ABANDONED")
        self._jobs.clear()
        self._engine.forget(self)
        self._wake.set()

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
