"""The stepper. Owns: the loaded revisions of a worker and what one turn of its loop does with them.

Everything that touches a scheduler or a runner passes through here, from one thread. Knows neither threads
nor streams: commands in, events out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from services.common.clock import Clock
from services.worker.core.admission import JobStart, Reason, Refusal
from services.worker.core.ports import ModelRunner
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Finish, Output, SequenceKey


@dataclass(frozen=True, slots=True)
class Host:
    """Take in a loaded revision."""

    revision: str
    runner: ModelRunner


@dataclass(frozen=True, slots=True)
class Unload:
    """Let a revision end what it runs, then free it."""

    revision: str


@dataclass(frozen=True, slots=True)
class Admit:
    """Begin a job: all of its sequences, or none."""

    job: JobStart


@dataclass(frozen=True, slots=True)
class AddCredit:
    """Let a sequence run on."""

    key: SequenceKey
    tokens: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End every sequence of a session; nobody hears of it."""

    session: int


Command = Host | Unload | Admit | AddCredit | Cancel | CloseSession


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A revision's memory is free."""

    revision: str


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A runner raised; every sequence of its revision ended with ERROR."""

    revision: str
    error: Exception


Event = Output | Refusal | Unloaded | StepFailed


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the stepper carries at one moment.

    Attributes:
        steps: Forward steps since the start.
        generated_tokens: Tokens since the start.
        running: Sequences that hold a slot.
        free_slots: Sequences that could start.
        paused: Sequences that wait for credit, by session.
        step_s: Seconds that the steps have taken since the start.
    """

    steps: int = 0
    generated_tokens: int = 0
    running: int = 0
    free_slots: int = 0
    paused: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    step_s: float = 0.0


@dataclass(slots=True)
class _Loaded:
    """A revision with its scheduler."""

    runner: ModelRunner
    scheduler: Scheduler
    leaving: bool = False

    @property
    def may_go(self) -> bool:
        """Whether it shall go and nothing runs on it any more."""
        return self.leaving and not self.scheduler.running


class Stepper:
    """Steps every loaded revision in turn.

    Args:
        slots: Sequences at once, over all revisions.
        clock: Measures steps, for the pace of prefill.
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
        prefix_cache_share: The part of a KV cache that rows of ended sequences may take; 0: none are kept.
    """

    def __init__(
        self,
        slots: int,
        clock: Clock,
        *,
        chunk_tokens: int,
        shared_chunk_tokens: int,
        prefix_cache_share: float,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._prefix_cache_share = prefix_cache_share
        self._chunk_tokens = chunk_tokens
        self._shared_chunk_tokens = shared_chunk_tokens
        self._loaded: dict[str, _Loaded] = {}
        self._steps = 0
        self._generated_tokens = 0
        self._step_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        # What is paused ends by a command or goes on by one; to look for that here would keep a core busy.
        return any(one.scheduler.has_work or one.may_go for one in self._loaded.values())

    @property
    def pulse(self) -> Pulse:
        """See `Pulse`."""
        running = self._running
        counted = Counter[int]()
        for one in self._loaded.values():
            counted.update(one.scheduler.paused_by_session())
        free, paused = self._slots - running, MappingProxyType(counted)
        return Pulse(self._steps, self._generated_tokens, running, free, paused, self._step_s)

    def handle(self, command: Command) -> tuple[Event, ...]:
        """Performs a command, between steps."""
        match command:
            case Host(revision, runner):
                self._host(revision, runner)
                return ()
            case Unload(revision):
                if (one := self._loaded.get(revision)) is not None:
                    one.leaving = True
                return ()
            case Admit(job):
                return self._admit(job)
            case AddCredit(key, tokens):
                for scheduler in self._schedulers():
                    scheduler.add_credit(key, tokens)
                return ()
            case Cancel(key):
                return tuple(
                    output
                    for scheduler in self._schedulers()
                    for output in scheduler.end(key, Finish.CANCELLED)
                )
            case CloseSession(session):
                self._close(session)
                return ()

    def step(self) -> tuple[Event, ...]:
        """One step of every revision that has work, and the end of those that leave."""
        events: list[Event] = []
        for revision, one in tuple(self._loaded.items()):
            events.extend(self._step(revision, one))
            if one.may_go:
                del self._loaded[revision]
                one.runner.close()
                events.append(Unloaded(revision))
        return tuple(events)

    @property
    def _running(self) -> int:
        return sum(scheduler.running for scheduler in self._schedulers())

    def _schedulers(self) -> Iterator[Scheduler]:
        return (one.scheduler for one in self._loaded.values())

    def _host(self, revision: str, runner: ModelRunner) -> None:
        kv_tokens = runner.facts.kv_tokens
        limits = Limits(
            slots=self._slots,
            kv_tokens=kv_tokens,
            chunk_tokens=self._chunk_tokens,
            shared_chunk_tokens=self._shared_chunk_tokens,
            prefix_tokens=int(kv_tokens * self._prefix_cache_share),
            guess_tokens=runner.facts.guess_tokens,
        )
        self._loaded[revision] = _Loaded(runner, Scheduler(limits, runner.facts.end_ids))

    def _admit(self, job: JobStart) -> tuple[Event, ...]:
        one = self._loaded.get(job.revision)
        if one is None or one.leaving:
            return (Refusal(job.key, Reason.REVISION_NOT_READY),)
        if self._running + len(job.starts) > self._slots or not one.scheduler.fits(*job.starts):
            return (Refusal(job.key, Reason.BUSY),)
        return tuple(output for start in job.starts for output in one.scheduler.admit(start))

    def _close(self, session: int) -> None:
        for scheduler in self._schedulers():
            for key in scheduler.keys:
                if key.session == session:
                    scheduler.end(key, Finish.CANCELLED)

    def _step(self, revision: str, one: _Loaded) -> tuple[Event, ...]:
        beside = any(other.scheduler.has_work for other in self._loaded.values() if other is not one)
        batch = one.scheduler.schedule(beside=beside)
        if batch is None:
            return ()
        self._steps += 1
        began_s = self._clock.monotonic()
        try:
            choices = one.runner.step(batch)
        except Exception as error:  # noqa: BLE001 - one step's failure must not end the loop
            return (*one.scheduler.fail(), StepFailed(revision, error))
        finally:
            took_s = self._clock.monotonic() - began_s
            self._step_s += took_s
        one.scheduler.pace(batch, took_s)
        outputs = one.scheduler.apply(choices)
        self._generated_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs
