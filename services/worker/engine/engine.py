"""The engine. Owns: the step thread, and how commands reach it and tokens leave it.

The stepper runs on a thread of its own; everything else is on the event loop. Commands cross in one
bounded mailbox; what a step produced crosses back in one call. Knows ports, never torch or gRPC.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.common import logs
from services.common.clock import Clock
from services.common.errors import ArgumentInvalid, InternalError
from services.common.standstill import stood_still
from services.worker.core.admission import JobStart, Refusal, judge
from services.worker.core.ports import FormatCompiler, ModelRunner
from services.worker.core.revision import ModelFacts, Phase, Residency
from services.worker.core.sequence import Output
from services.worker.core.stepper import (
    CloseSession,
    Command,
    Event,
    Host,
    Pulse,
    StepFailed,
    Stepper,
    Unload,
    Unloaded,
)
from services.worker.engine.mailbox import Mailbox
from services.worker.engine.session import EngineSession

# A runner that fails this often in a row will not recover; a fresh process may.
FAILURES_MAX = 3

# How much finer than its limit the watchdog looks.
WATCHDOG_PARTS = 10


class EngineOverloaded(InternalError):
    """The step thread does not take commands; the session that sent one ends."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine stays within.

    Attributes:
        slots: Sequences at once.
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
        watchdog_s: A step that takes longer hangs.
        prefix_cache_share: The part of a KV cache that rows of ended sequences may take; 0: none are kept.
    """

    slots: int
    chunk_tokens: int = 512
    shared_chunk_tokens: int = 128
    watchdog_s: float = 30.0
    prefix_cache_share: float = 0.5


class Engine:
    """Runs sequences of all sessions on all active revisions.

    Args:
        residency: What is resident, and whether the worker drains; owned by the event loop.
        settings: The limits.
        clock: For the watchdog.
        on_fatal: Called once, on the event loop, when the step thread hangs or keeps failing.
    """

    def __init__(
        self, residency: Residency, settings: EngineSettings, clock: Clock, on_fatal: Callable[[str], None]
    ) -> None:
        self._residency = residency
        self._settings = settings
        self._clock = clock
        self._on_fatal = on_fatal
        self._stepper = Stepper(
            settings.slots,
            clock,
            chunk_tokens=settings.chunk_tokens,
            shared_chunk_tokens=settings.shared_chunk_tokens,
            prefix_cache_share=settings.prefix_cache_share,
        )
        self._mailbox = Mailbox()
        self._sessions: dict[int, EngineSession] = {}
        self._numbers = itertools.count(1)
        self._facts: dict[str, ModelFacts] = {}
        self._formats: dict[str, FormatCompiler] = {}
        self._unloads: dict[str, asyncio.Future[None]] = {}
        self._step_began_s: float | None = None
        self._became_idle = asyncio.Event()
        self._failures = 0
        self._dead = False
        self._pulse = Pulse(free_slots=settings.slots)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._log_context = contextvars.Context()
        self._thread: threading.Thread | None = None
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def pulse(self) -> Pulse:
        """What is carried now, as of the last step."""
        return self._pulse

    @property
    def slots(self) -> int:
        """Sequences at once."""
        return self._settings.slots

    def start(self) -> None:
        """Starts the step thread and its watchdog; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._log_context = logs.process_context()
        # Daemon: a step that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch(), name="watchdog")

    async def stop(self) -> None:
        """Ends the sessions and the thread, after the step under way."""
        self.end_sessions()
        if self._watchdog is not None:
            self._watchdog.cancel()
            await asyncio.gather(self._watchdog, return_exceptions=True)
        self._mailbox.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._settings.watchdog_s)

    def open_session(self) -> EngineSession:
        """A session for one gateway's stream; close it when the stream ends."""
        session = EngineSession(next(self._numbers), self)
        self._sessions[session.number] = session
        return session

    def judge(self, job: JobStart) -> Refusal | None:
        """Why a job cannot be taken, as far as is known before its turn."""
        return judge(job, self._residency, self._facts.get(job.revision), self._settings.slots)

    def post(self, command: Command) -> None:
        """Hands a command to the step thread.

        Raises:
            EngineOverloaded: The thread does not take them.
        """
        if not self._mailbox.put(command):
            raise EngineOverloaded("The worker does not keep up with its commands.")

    async def constrained(self, job: JobStart) -> JobStart:
        """The job with the constraint that its format asks for, one for each sequence.

        Raises:
            ArgumentInvalid: There can be none.
            FormatBusy: Too many others wait.
        """
        compiler = self._formats.get(job.revision)
        if compiler is None or job.form is None:
            raise ArgumentInvalid("format: is not served for this revision.")
        starts = [
            replace(start, constraint=await compiler.constrain(job.form, start.emitted_ids))
            for start in job.starts
        ]
        return replace(job, starts=tuple(starts))

    def host(self, revision: str, runner: ModelRunner, formats: FormatCompiler | None = None) -> None:
        """Takes in a loaded revision; it serves once it is active in the residency."""
        self._facts[revision] = runner.facts
        if formats is not None:
            self._formats[revision] = formats
        self.post(Host(revision, runner))

    async def unload(self, revision: str) -> None:
        """Ends a revision when its last sequence has ended; returns when its memory is free."""
        if self._facts.pop(revision, None) is None:
            return
        self._formats.pop(revision, None)
        ended = asyncio.get_running_loop().create_future()
        self._unloads[revision] = ended
        self.post(Unload(revision))
        await ended

    async def drained(self) -> None:
        """Returns when no session has a job or an unwritten word."""
        while not all(session.idle for session in self._sessions.values()):
            self._became_idle.clear()
            await self._became_idle.wait()

    def end_sessions(self) -> None:
        """Closes every session: their streams end."""
        for session in tuple(self._sessions.values()):
            session.close()

    def note_idle(self) -> None:
        """A session has nothing left to do or to say."""
        self._became_idle.set()

    def forget(self, session: EngineSession) -> None:
        """Lets a closed session's sequences end."""
        self.note_idle()
        if self._sessions.pop(session.number, None) is not None:
            # Room for it is certain: the mailbox takes the ends of sessions over its bound.
            self._mailbox.put(CloseSession(session.number), urgent=True)

    def _run(self) -> None:
        """The step thread."""
        while (commands := self._mailbox.take(wait=not self._stepper.has_work)) is not None:
            self._step_began_s = self._clock.monotonic()
            events: list[Event] = []
            for command in commands:
                events.extend(self._stepper.handle(command))
            events.extend(self._stepper.step())
            self._pulse = self._stepper.pulse
            self._step_began_s = None
            self._cross(events)

    def _cross(self, events: list[Event]) -> None:
        assert self._loop is not None
        try:
            if events:
                self._loop.call_soon_threadsafe(self._deliver, events, context=self._log_context)
        except RuntimeError:
            # The loop is closed: nobody listens any more.
            self._mailbox.close()

    def _deliver(self, events: list[Event]) -> None:
        touched: set[EngineSession] = set()
        for event in events:
            match event:
                case Output() | Refusal():
                    if (session := self._sessions.get(event.key.session)) is not None:
                        session.put(event)
                        touched.add(session)
                case Unloaded(revision):
                    ended = self._unloads.pop(revision)
                    # Whoever waited for it may have been cancelled.
                    if not ended.done():
                        ended.set_result(None)
                case StepFailed(revision, error):
                    self._note_failure(revision, error)
        if not any(isinstance(event, StepFailed) for event in events):
            self._failures = 0
        for session in touched:
            session.wake()

    def _note_failure(self, revision: str, error: Exception) -> None:
        logs.get_logger().error("step.failed", revision=revision, exc_info=error)
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            self._die("The model's steps keep failing.")

    async def _watch(self) -> None:
        limit_s = self._settings.watchdog_s
        interval_s = limit_s / WATCHDOG_PARTS
        woke_s = looked_s = self._clock.monotonic()
        while not self._dead:
            await asyncio.sleep(interval_s)
            now_s = self._clock.monotonic()
            if stood_still(looked_s + interval_s, now_s):
                # And the step with it.
                woke_s = now_s
            looked_s = now_s
            began_s = self._step_began_s
            if began_s is not None and now_s - max(began_s, woke_s) > limit_s:
                self._die("A step does not end.")

    def _die(self, cause: str) -> None:
        if not self._dead:
            self._dead = True
            logs.get_logger().critical("engine.died", cause=cause, phases=_phases(self._residency))
            self._on_fatal(cause)


def _phases(residency: Residency) -> dict[str, Phase]:
    return {one.revision: one.phase for one in residency.all}
