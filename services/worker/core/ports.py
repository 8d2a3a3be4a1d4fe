"""The ports of the worker: what its engine and its preparation need of the world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from services.worker.core.batch import Batch, Choice
from services.worker.core.format import Constraint, Format
from services.worker.core.revision import LoadStage, ModelFacts, RevisionSpec

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many; 0 of 0 where nobody can know."""

LoadWatch = Callable[[LoadStage, int, int], None]
"""Is told by a load what it is busy with, bytes done and of how many; raises `LoadHalted` to end it."""


def unwatched(stage: LoadStage, done_bytes: int, total_bytes: int) -> None:
    """A `LoadWatch` for who does not care."""
    del stage, done_bytes, total_bytes


@runtime_checkable
class ModelRunner(Protocol):
    """A loaded revision. One thread at a time calls it."""

    @property
    def facts(self) -> ModelFacts:
        """What its scheduler and its callers must know of it."""
        ...

    def step(self, batch: Batch) -> Sequence[Choice]:
        """Performs one batch; returns a choice for each of `batch.draws`, NO_TOKEN where none exists."""
        ...

    def rehearse(self) -> None:
        """Does once what is slow the first time, as far as it is known: without it the first requests do."""
        ...

    def close(self) -> None:
        """Frees the memory; nothing is called afterwards."""
        ...


class FormatCompiler(Protocol):
    """Makes constraints over the vocabulary of one revision."""

    async def constrain(self, form: Format, emitted_ids: Sequence[int]) -> Constraint:
        """Compiles a format and passes over what was emitted already, within bounded time and memory.

        Raises:
            ArgumentInvalid: The format is not well-formed or too complex, or the tokens do not fit it.
            FormatBusy: Too many others wait.
        """
        ...


class FormatLibrary(Protocol):
    """Where compilers of formats come from."""

    def open(self, directory: Path, facts: ModelFacts) -> FormatCompiler:
        """The compiler of a loaded revision; its tokenizer is read when it is first needed."""
        ...

    async def close(self) -> None:
        """Ends what helps with compiling."""
        ...


class ArtifactStore(Protocol):
    """Where the files of revisions come from."""

    async def fetch(self, spec: RevisionSpec, progress: Progress) -> Path:
        """Returns a directory that holds the revision's files, every digest checked.

        They stay there until they are released, also where this raises or is cancelled.

        Raises:
            InterlockError: They cannot be had, or break a rule.
        """
        ...

    def release(self, revision: str) -> None:
        """The revision is not resident any more: its files may go where room is needed."""
        ...


class RevisionLoader(Protocol):
    """How files become a runner. All verbs block; they are called in a thread of their own.

    A load tells its watch how far it is whenever it can stop.
    """

    def verify(self, directory: Path, spec: RevisionSpec) -> None:
        """Checks configuration and headers without reading a weight.

        Raises:
            ArtifactInvalid: This revision cannot be served; the message names why, and no path.
        """
        ...

    def weights_bytes_least(self, directory: Path, spec: RevisionSpec) -> int:
        """Memory that the weights of a verified revision take at the least, as far as headers tell."""
        ...

    def load(self, directory: Path, spec: RevisionSpec, watch: LoadWatch) -> ModelRunner:
        """Quantizes the weights, or maps what was quantized before.

        Raises:
            LoadHalted: The watch wanted the end.
            MemoryError: There is not enough for it.
            ArtifactInvalid: The weights do not make the model that the configuration describes.
        """
        ...


class RevisionHandshake(Protocol):
    """What a controller asks of a worker; each verb returns at once and is answered by reports."""

    def prepare(self, spec: RevisionSpec) -> None:
        """Makes a revision ready; one that is ready already says so again."""
        ...

    def stage(self, spec: RevisionSpec) -> None:
        """Has a revision's files here and checked, and loads nothing; one that is ready says so again."""
        ...

    def activate(self, revision: str, epoch: int) -> None:
        """Lets jobs name the revision, from this epoch on."""
        ...

    def prove(self, revision: str) -> None:
        """Asks a revision that serves its golden prompts again."""
        ...

    def retire(self, revision: str) -> None:
        """Ends what the revision runs and frees it."""
        ...

    def abort(self, revision: str) -> None:
        """Stops preparing it, and forgets that it was staged."""
        ...


class ChatTokenizer(Protocol):
    """Text to token ids and back, with one revision's chat template."""

    def encode_user(self, text: str) -> tuple[int, ...]:
        """The ids of a conversation of one turn. Blocks.

        Raises:
            ArgumentInvalid: The template refuses it.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; special tokens become nothing."""
        ...
