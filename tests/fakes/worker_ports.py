"""Fakes of the worker's ports: a runner without a model, a store without files, a loader without weights."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from services.common.errors import ArtifactInvalid
from services.worker.core.admission import JobStart, Refusal
from services.worker.core.batch import Batch, Choice, Chunk, Decode
from services.worker.core.format import Constraint, Format
from services.worker.core.ports import LoadWatch, ModelRunner, Progress, unwatched
from services.worker.core.revision import LoadStage, ModelFacts, RevisionSpec
from services.worker.core.scheduler import NO_TOKEN
from services.worker.core.stepper import Command, Pulse
from services.worker.engine.session import EngineSession

VOCABULARY = 1_000
FACTS = ModelFacts(
    vocabulary=VOCABULARY, context_tokens=256, end_ids=frozenset(), kv_tokens=8 * 256, weights_bytes=1_000
)


def next_token(history: Sequence[int]) -> int:
    """What the fake model says after `history`: a function of all of it, and of nothing else."""
    state = 17
    for token in history:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCABULARY


def continuation(prompt: Sequence[int], tokens: int) -> list[int]:
    """The fake model's answer of so many tokens."""
    history = list(prompt)
    for _ in range(tokens):
        history.append(next_token(history))
    return history[len(prompt) :]


class FakeRunner:
    """Keeps the tokens that real rows would hold keys of, and fails when a batch contradicts them.

    Attributes:
        batches: What was stepped.
        gate: When set to an event, each step waits for it.
        error: Raised by the next step when set.
        poisoned: Rows' first tokens for which NO_TOKEN is returned.
        flaw: What is said of them; empty: nothing.
        closed: Whether `close` was called.
        computed_tokens: Tokens that passed the model.
    """

    def __init__(self, facts: ModelFacts = FACTS) -> None:
        self._facts = facts
        self._rows: dict[int, list[int]] = {}
        self._height = 0
        self.batches: list[Batch] = []
        self.computed_tokens = 0
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.poisoned: frozenset[int] = frozenset()
        self.flaw = ""
        self.closed = False

    @property
    def facts(self) -> ModelFacts:
        """See `ModelRunner.facts`."""
        return self._facts

    def rehearse(self) -> None:
        """See `ModelRunner.rehearse`."""

    def step(self, batch: Batch) -> Sequence[Choice]:
        """See `ModelRunner.step`."""
        self.batches.append(batch)
        self.entered.set()
        if self.gate is not None:
            self.gate.wait(30)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        assert batch.rows * batch.capacity <= self._facts.kv_tokens
        self._move(batch)
        tokens = [self._chunk(chunk, batch) for chunk in batch.chunks]
        drawn = [token for token, chunk in zip(tokens, batch.chunks, strict=True) if chunk.draw]
        assert [decode.row for decode in batch.decodes] == sorted({decode.row for decode in batch.decodes})
        decoded = [self._decode(decode, batch) for decode in batch.decodes]
        chosen = (*drawn, *decoded)
        return [Choice(token, flaw=self.flaw if token == NO_TOKEN else "") for token in chosen]

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self.closed = True

    def _move(self, batch: Batch) -> None:
        """Adds rows, copies, and gives up what the batch does not name, as a frugal runner may."""
        self._height = max(self._height, batch.rows)
        for move in batch.moves:
            assert max(move.source, move.target) < self._height
            assert 0 < move.tokens <= min(batch.capacity, len(self._rows[move.source]))
            self._rows[move.target] = self._rows[move.source][: move.tokens]
        self._height = batch.rows
        self._rows = {row: held[: batch.capacity] for row, held in self._rows.items() if row < batch.rows}

    def _chunk(self, chunk: Chunk, batch: Batch) -> int:
        assert chunk.row < batch.rows
        assert chunk.position + len(chunk.token_ids) <= batch.capacity
        return self._write(chunk.row, chunk.position, chunk.token_ids)

    def _decode(self, decode: Decode, batch: Batch) -> int:
        assert decode.row < batch.rows
        assert decode.position < batch.capacity
        return self._write(decode.row, decode.position, (decode.token_id,))

    def _write(self, row: int, position: int, token_ids: Sequence[int]) -> int:
        held = self._rows.setdefault(row, [])
        assert position <= len(held), "a position was skipped"
        self._rows[row] = [*held[:position], *token_ids]
        self.computed_tokens += len(token_ids)
        return NO_TOKEN if self._rows[row][0] in self.poisoned else next_token(self._rows[row])


class FakeConstraint:
    """Allows every token."""

    def allowed(self, emitted_ids: Sequence[int]) -> bytes:
        """See `Constraint.allowed`."""
        del emitted_ids
        return b"\xff" * (VOCABULARY // 8)


class FakeCompiler:
    """Compiles when a test lets it.

    Attributes:
        gate: Compilations wait for it.
        error: Raised by them when set.
        asked: What was to be compiled, with what was emitted before.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.asked: list[tuple[Format, tuple[int, ...]]] = []

    async def constrain(self, form: Format, emitted_ids: Sequence[int]) -> Constraint:
        """See `FormatCompiler.constrain`."""
        self.asked.append((form, tuple(emitted_ids)))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return FakeConstraint()


class FakeStore:
    """A store that has everything; `error` is raised instead when set.

    Attributes:
        fetched: What was asked for.
        held: Revisions whose files were fetched and not released.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.fetched: list[RevisionSpec] = []
        self.held: set[str] = set()

    async def fetch(self, spec: RevisionSpec, progress: Progress) -> Path:
        """See `ArtifactStore.fetch`."""
        self.fetched.append(spec)
        self.held.add(spec.revision)
        if self.error is not None:
            raise self.error
        progress(10, 10)
        return Path("/nowhere")

    def release(self, revision: str) -> None:
        """See `ArtifactStore.release`."""
        self.held.discard(revision)


class FakeLoader:
    """Loads FakeRunners.

    Attributes:
        flaw: The message with which `verify` refuses, when set.
        error: Raised by `load` when set.
        runners: What was loaded.
        facts: Of the runners.
        told: What a load tells its watch.
        gate: When set to an event, a load waits for it before it goes on telling.
        told_every_s: Pause before each of them.
        entered: A load has begun.
        least_bytes: What the weights take at the least.
    """

    def __init__(self, facts: ModelFacts = FACTS) -> None:
        self.flaw = ""
        self.error: Exception | None = None
        self.runners: list[FakeRunner] = []
        self.facts = facts
        self.told: list[tuple[LoadStage, int, int]] = []
        self.gate: threading.Event | None = None
        self.told_every_s = 0.0
        self.entered = threading.Event()
        self.least_bytes = 0

    def verify(self, directory: Path, spec: RevisionSpec) -> None:  # noqa: ARG002 - the port's signature
        """See `RevisionLoader.verify`."""
        if self.flaw:
            raise ArtifactInvalid(self.flaw)

    def weights_bytes_least(self, directory: Path, spec: RevisionSpec) -> int:  # noqa: ARG002 - as above
        """See `RevisionLoader.weights_bytes_least`."""
        return self.least_bytes

    def load(
        self,
        directory: Path,  # noqa: ARG002 - as above
        spec: RevisionSpec,  # noqa: ARG002 - as above
        watch: LoadWatch = unwatched,
    ) -> ModelRunner:
        """See `RevisionLoader.load`."""
        self.entered.set()
        for one in self.told:
            if self.gate is not None:
                self.gate.wait(30)
            time.sleep(self.told_every_s)
            watch(*one)
        if self.error is not None:
            raise self.error
        self.runners.append(FakeRunner(self.facts))
        return self.runners[-1]


class FakeHost:
    """An engine without steps; formats are compiled when the test says so."""

    def __init__(self) -> None:
        self.pulse = Pulse(free_slots=4)
        self.posted: list[Command] = []
        self.forgotten = 0
        self.compiled = asyncio.Event()

    def judge(self, job: JobStart) -> Refusal | None:
        """Every job is taken."""
        del job
        return None

    async def constrained(self, job: JobStart) -> JobStart:
        """Waits, and does not mind being cancelled, as a thread that compiles does not."""
        with contextlib.suppress(asyncio.CancelledError):
            await self.compiled.wait()
        return job

    def post(self, command: Command) -> None:
        """Remembers it."""
        self.posted.append(command)

    def note_idle(self) -> None:
        """Nobody waits for it."""

    def forget(self, session: EngineSession) -> None:
        """Counts it."""
        del session
        self.forgotten += 1
