"""Preparation. Owns: how a revision gets into the engine, phase by phase, and out of it again.

FETCH, VERIFY, LOAD and WARM run beside serving: what blocks is in a thread. One revision is prepared at a
time, for two would compete for the same memory and disk. A load that is no longer wanted is halted where it
next tells how far it is; asked for again before its thread has ended, it begins anew after that. Where
memory holds one revision, the next one is staged before the other one goes: FETCH and VERIFY alone. Knows
ports; who asks is the controller link.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from services.common import logs
from services.common.clock import Clock
from services.common.errors import ArtifactInvalid, InterlockError
from services.worker.core.golden import answer_all
from services.worker.core.memory_room import check_room
from services.worker.core.ports import (
    ArtifactStore,
    ChatTokenizer,
    FormatCompiler,
    FormatLibrary,
    LoadWatch,
    ModelRunner,
    RevisionLoader,
)
from services.worker.core.revision import (
    BecameActive,
    BecameReady,
    BecameRetired,
    BecameStaged,
    LoadHalted,
    LoadStage,
    Phase,
    PreparationFailed,
    Progressed,
    Report,
    Residency,
    RevisionSpec,
)
from services.worker.core.warmup import warm
from services.worker.engine.abandonable import in_thread
from services.worker.engine.engine import Engine
from services.worker.engine.proofs import Proofs
from services.worker.engine.stages import Stages

T = TypeVar("T")

# A load notices within a layer that it shall end. What takes longer sits in a library and is not waited for.
STOP_WAIT_S = 2.0


class _Loaded(NamedTuple):
    """What a load comes to; the tokenizer where there are golden prompts."""

    runner: ModelRunner
    compiler: FormatCompiler | None
    tokenizer: ChatTokenizer | None


class Preparation:
    """Performs a controller's commands on revisions.

    Args:
        engine: Hosts what is loaded.
        residency: Where each revision's phase is kept.
        store: Where files come from.
        loader: What makes runners of files.
        clock: Measures the phases.
        report: Hears what came of the commands.
        on_change: Hears that the residency changed, for health.
        formats: Where compilers of formats come from; None: jobs that have one are refused.
        open_tokenizer: Reads the tokenizer of a directory; None: revisions with golden prompts are refused.
        memory_bytes: What the weights of all revisions may take together; 0: no bound is known.
    """

    def __init__(  # noqa: PLR0913 - one is made, and most are given by name
        self,
        engine: Engine,
        residency: Residency,
        store: ArtifactStore,
        loader: RevisionLoader,
        clock: Clock,
        *,
        report: Callable[[Report], None],
        on_change: Callable[[], None],
        formats: FormatLibrary | None = None,
        open_tokenizer: Callable[[Path], ChatTokenizer] | None = None,
        memory_bytes: int = 0,
    ) -> None:
        self._engine = engine
        self._residency = residency
        self._store = store
        self._loader = loader
        self._clock = clock
        self._report = report
        self._on_change = on_change
        self._formats = formats
        self._open_tokenizer = open_tokenizer
        self._memory_bytes = memory_bytes
        self._one_at_a_time = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # What was asked of a revision while its task was on its way out: the last word.
        self._next: dict[str, Callable[[], None]] = {}
        self._ready: dict[str, BecameReady] = {}
        self._proofs = Proofs(engine, lambda: residency.epoch, report)

    def prepare(self, spec: RevisionSpec) -> None:
        """See `RevisionHandshake.prepare`."""
        if (ready := self._ready.get(spec.revision)) is not None:
            self._report(ready)
        elif self._is_free(spec.revision, lambda: self.prepare(spec)):
            self._residency.begin(spec.model, spec.revision)
            self._spawn(spec.revision, self._prepare(spec))

    def stage(self, spec: RevisionSpec) -> None:
        """See `RevisionHandshake.stage`."""
        known = self._residency.find(spec.revision)
        if (ready := self._ready.get(spec.revision)) is not None:
            self._report(ready)
        elif known is not None and known.phase is Phase.STAGED:
            self._report(BecameStaged(spec.revision))
        elif self._is_free(spec.revision, lambda: self.stage(spec)):
            self._residency.begin(spec.model, spec.revision, staging=True)
            self._spawn(spec.revision, self._stage(spec))

    def activate(self, revision: str, epoch: int) -> None:
        """See `RevisionHandshake.activate`."""
        if revision not in self._ready:
            self._report(PreparationFailed(revision, Phase.READY, "The revision is not ready here."))
            return
        self._residency.activate(revision, epoch)
        logs.get_logger().info("revision.activated", revision=revision, epoch=epoch)
        self._report(BecameActive(revision, epoch))
        self._on_change()

    def prove(self, revision: str) -> None:
        """See `RevisionHandshake.prove`."""
        self._proofs.ask(revision)

    def retire(self, revision: str) -> None:
        """See `RevisionHandshake.retire`."""
        self._proofs.drop(revision)
        if self._ready.pop(revision, None) is None:
            self._report(BecameRetired(revision))
            return
        self._residency.enter(revision, Phase.RETIRING)
        self._on_change()
        self._spawn(revision, self._retire(revision))

    def abort(self, revision: str) -> None:
        """See `RevisionHandshake.abort`."""
        if revision in self._ready:
            return
        self._next.pop(revision, None)
        task = self._tasks.get(revision)
        if task is not None and not self._has_spoken(revision):
            _cancel(task)
            return
        known = self._residency.find(revision)
        if known is not None and known.phase is Phase.STAGED:
            self._drop(revision)
        self._report(BecameRetired(revision))

    async def stop(self) -> bool:
        """Ends what is under way; returns whether it did. A thread that has not ends with the process."""
        await self._proofs.stop()
        self._next.clear()
        tasks = tuple(self._tasks.values())
        for task in tasks:
            _cancel(task)
        if not tasks:
            return True
        _, pending = await asyncio.wait(tasks, timeout=STOP_WAIT_S)
        return not pending

    def _is_free(self, revision: str, again: Callable[[], None]) -> bool:
        """Whether nothing is under way with a revision; what is about to end does so before `again`."""
        task = self._tasks.get(revision)
        if task is not None and (task.cancelling() or self._has_spoken(revision)):
            self._next[revision] = again
        return task is None

    def _has_spoken(self, revision: str) -> bool:
        """Whether a task that is still there has told what became of its revision.

        It leaves with the next turn. Nothing comes of cancelling it, and a word would be waited for in vain.
        """
        known = self._residency.find(revision)
        return known is None or known.phase in {Phase.STAGED, Phase.FAILED}

    def _spawn(self, revision: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"revision-{revision}")
        self._tasks[revision] = task
        task.add_done_callback(lambda done: self._forget(revision, done))

    def _drop(self, revision: str) -> None:
        """The revision is not resident any more, and its files may go."""
        self._residency.remove(revision)
        self._store.release(revision)

    def _forget(self, revision: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(revision) is task:
            del self._tasks[revision]
        again = self._next.pop(revision, None)
        if task.cancelled():
            self._drop(revision)
            if again is None:
                self._report(BecameRetired(revision))
        if again is not None:
            again()
        if not task.cancelled() and (error := task.exception()) is not None:
            logs.get_logger().error("revision.crashed", revision=revision, exc_info=error)

    async def _stage(self, spec: RevisionSpec) -> None:
        stages = Stages(self._clock)
        if await self._alone(spec, stages, lambda: self._obtain(spec, stages)) is None:
            return
        self._residency.enter(spec.revision, Phase.STAGED)
        phases_s = {f"{name}_s": round(duration_s, 3) for name, duration_s in stages.durations_s()}
        logs.get_logger().info("revision.staged", model=spec.model, revision=spec.revision, **phases_s)
        self._report(BecameStaged(spec.revision))

    async def _alone(
        self, spec: RevisionSpec, stages: Stages, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> T | None:
        """Performs work on a revision when it is the only one; None: it failed, which has been reported."""
        try:
            async with self._one_at_a_time:
                return await work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the controller must hear of it
            self._fail(spec, stages.phase, error)
            return None

    async def _prepare(self, spec: RevisionSpec) -> None:
        stages = Stages(self._clock)
        loaded = await self._alone(spec, stages, lambda: self._load(spec, stages))
        if loaded is None:
            return
        runner, compiler, tokenizer = loaded
        if tokenizer is not None:
            self._proofs.keep(spec, tokenizer)
        weights_bytes = runner.facts.weights_bytes
        self._engine.host(spec.revision, runner, compiler)
        self._residency.enter(spec.revision, Phase.READY, weights_bytes=weights_bytes)
        ready = BecameReady(spec.revision, weights_bytes, stages.durations_s())
        self._ready[spec.revision] = ready
        logs.get_logger().info(
            "revision.ready",
            model=spec.model,
            revision=spec.revision,
            weights_bytes=weights_bytes,
            kv_tokens=runner.facts.kv_tokens,
            **{f"{name}_s": round(duration_s, 3) for name, duration_s in ready.phases_s},
        )
        self._report(ready)

    async def _obtain(self, spec: RevisionSpec, stages: Stages) -> Path:
        """FETCH and VERIFY; returns where the files are."""

        def progress(done_bytes: int, total_bytes: int) -> None:
            self._report(Progressed(spec.revision, stages.phase, done_bytes, total_bytes))

        stages.enter(Phase.FETCH)
        progress(0, 0)
        directory = await self._store.fetch(spec, progress)
        self._advance(spec, stages, Phase.VERIFY)
        verify = in_thread(lambda: self._verify(directory, spec), "verify")
        self._check_room(spec, await _finished(verify, threading.Event()))
        return directory

    def _verify(self, directory: Path, spec: RevisionSpec) -> int:
        """Finds what can be known before a weight is read, and tells what memory it needs; in a thread."""
        self._loader.verify(directory, spec)
        return self._loader.weights_bytes_least(directory, spec)

    def _check_room(self, spec: RevisionSpec, needed_bytes: int) -> None:
        known = self._residency.find(spec.revision)
        # What is staged is loaded when the others have gone.
        stays = () if known is not None and known.staging else self._residency.all
        others = (one for one in stays if one.revision != spec.revision)
        check_room(needed_bytes, others, self._memory_bytes)

    async def _load(self, spec: RevisionSpec, stages: Stages) -> _Loaded:
        directory = await self._obtain(spec, stages)
        halt = threading.Event()
        self._advance(spec, stages, Phase.LOAD)
        watch = self._watch(spec, stages, halt)
        runner = await _finished(in_thread(lambda: self._loader.load(directory, spec, watch), "load"), halt)
        try:
            # Now it is measured.
            self._check_room(spec, runner.facts.weights_bytes)
            self._advance(spec, stages, Phase.WARM)
            proof = in_thread(lambda: self._prove(directory, spec, runner, halt), "warm")
            tokenizer = await _finished(proof, halt)
        except BaseException:
            runner.close()
            raise
        compiler = None if self._formats is None else self._formats.open(directory, runner.facts)
        return _Loaded(runner, compiler, tokenizer)

    def _prove(
        self, directory: Path, spec: RevisionSpec, runner: ModelRunner, halt: threading.Event
    ) -> ChatTokenizer | None:
        """Lets a loaded revision generate, and answer what it must; in a thread. Returns its tokenizer."""
        warm(runner)
        if not spec.golden_prompts:
            return None
        if self._open_tokenizer is None:
            raise ArtifactInvalid("This worker cannot read golden prompts.")
        tokenizer = self._open_tokenizer(directory)
        answer_all(runner, tokenizer, spec.golden_prompts, halt.is_set)
        return tokenizer

    def _watch(self, spec: RevisionSpec, stages: Stages, halt: threading.Event) -> LoadWatch:
        """What a load tells from its thread, reported on the loop."""
        loop = asyncio.get_running_loop()

        def report(stage: LoadStage, done_bytes: int, total_bytes: int) -> None:
            stages.turn_to(stage)
            self._report(Progressed(spec.revision, Phase.LOAD, done_bytes, total_bytes))

        def watch(stage: LoadStage, done_bytes: int, total_bytes: int) -> None:
            if halt.is_set():
                raise LoadHalted
            loop.call_soon_threadsafe(report, stage, done_bytes, total_bytes)

        return watch

    def _advance(self, spec: RevisionSpec, stages: Stages, phase: Phase) -> None:
        stages.enter(phase)
        self._residency.enter(spec.revision, phase)
        self._report(Progressed(spec.revision, phase))

    def _fail(self, spec: RevisionSpec, phase: Phase, error: Exception) -> None:
        if isinstance(error, InterlockError):
            reason = error.message
        elif isinstance(error, MemoryError):
            reason = (
                "The worker has not enough memory for it. Roll it out with the strategy swap, choose a"
                " smaller quantization, or give the worker more."
            )
        else:
            reason = "Something went wrong in the worker. Its log has the details."
        logs.get_logger().error(
            "revision.failed", revision=spec.revision, phase=phase.value, reason=reason, exc_info=error
        )
        self._residency.enter(spec.revision, Phase.FAILED, failure=reason)
        self._store.release(spec.revision)
        self._report(PreparationFailed(spec.revision, phase, reason))

    async def _retire(self, revision: str) -> None:
        await self._engine.unload(revision)
        self._drop(revision)
        logs.get_logger().info("revision.retired", revision=revision)
        self._report(BecameRetired(revision))


def _cancel(task: asyncio.Task[None]) -> None:
    """Cancels once: a second time would not wait for the thread, and the next load would begin beside it."""
    if not task.cancelling():
        task.cancel()


async def _finished(work: Coroutine[Any, Any, T], halt: threading.Event) -> T:
    """Awaits work in a thread to its end, even when cancelled: what it allocates must not go astray.

    Cancelled, it asks the work to halt.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        halt.set()
        with contextlib.suppress(Exception):
            result = await task
            if isinstance(result, ModelRunner):
                result.close()
        raise
