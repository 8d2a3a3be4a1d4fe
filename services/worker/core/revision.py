"""Revisions. Owns: what one is, which phases it passes through in a worker, and what is resident.

The phases are a table; an illegal step raises and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from services.common.errors import InternalError


class Quantization(StrEnum):
    """How weights are held."""

    AUTO = "auto"
    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4"


class ComputeDtype(StrEnum):
    """The number format of activations."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Phase(StrEnum):
    """Where a revision is; the names are those of `interlock.v1.RevisionPhase`."""

    FETCH = "FETCH"
    VERIFY = "VERIFY"
    LOAD = "LOAD"
    WARM = "WARM"
    READY = "READY"
    ACTIVE = "ACTIVE"
    RETIRING = "RETIRING"
    FAILED = "FAILED"
    STAGED = "STAGED"


class LoadStage(StrEnum):
    """What LOAD is busy with."""

    QUANTIZE = "quantize"
    """The weights are brought into their final layout, or another worker is doing it."""
    MAP = "map"
    """They are taken from where they are stored."""


class LoadHalted(Exception):
    """A load was ended on demand. Raised by who watches it, through whoever performs it."""


# From each phase, where a revision may go next. FAILED may be prepared again. So may STAGED, once there is
# room for it: its files are looked at again, for time has passed. RETIRING ends in removal.
NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.FETCH: frozenset({Phase.VERIFY, Phase.FAILED}),
    Phase.VERIFY: frozenset({Phase.LOAD, Phase.STAGED, Phase.FAILED}),
    Phase.STAGED: frozenset({Phase.FETCH}),
    Phase.LOAD: frozenset({Phase.WARM, Phase.FAILED}),
    Phase.WARM: frozenset({Phase.READY, Phase.FAILED}),
    Phase.READY: frozenset({Phase.ACTIVE, Phase.RETIRING}),
    Phase.ACTIVE: frozenset({Phase.ACTIVE, Phase.RETIRING}),
    Phase.RETIRING: frozenset(),
    Phase.FAILED: frozenset({Phase.FETCH}),
}


@dataclass(frozen=True, slots=True)
class RevisionFile:
    """One file of a revision: its name, its length in bytes and its SHA-256 in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """A prompt, a string that its greedy answer must contain, and the most tokens of the answer."""

    text: str
    expected: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class RevisionSpec:
    """What shall be prepared.

    Attributes:
        model: The model's name.
        revision: The revision's name.
        files: Its files.
        quantization: How its weights shall be held.
        compute_dtype: The format of activations.
        context_tokens: Most tokens of prompt and output; 0: what the model allows.
        local_path: A directory that may hold the files already; empty: none.
        golden_prompts: What it must answer before it may serve.
    """

    model: str
    revision: str
    files: tuple[RevisionFile, ...] = ()
    quantization: Quantization = Quantization.AUTO
    compute_dtype: ComputeDtype = ComputeDtype.AUTO
    context_tokens: int = 0
    local_path: str = ""
    golden_prompts: tuple[GoldenPrompt, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a loaded model.

    Attributes:
        vocabulary: Token ids are below it.
        context_tokens: Most tokens of prompt and output together.
        end_ids: Tokens that end an answer.
        kv_tokens: Area of the KV cache that its budget of bytes allows, in row positions.
        weights_bytes: Memory of the weights, measured.
        guess_tokens: Tokens of a guess that one pass checks at little cost, and to the bit; 0: none.
    """

    vocabulary: int
    context_tokens: int
    end_ids: frozenset[int]
    kv_tokens: int
    weights_bytes: int
    guess_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """A revision inside the worker.

    Attributes:
        model: The model's name.
        revision: The revision's name.
        phase: Where it is.
        weights_bytes: Memory of the weights; 0 before it is loaded.
        failure: Why it failed; empty otherwise.
        staging: Whether it is on its way to STAGED, and not to READY.
    """

    model: str
    revision: str
    phase: Phase
    weights_bytes: int = 0
    failure: str = ""
    staging: bool = False


class Residency:
    """What is resident, and the highest epoch and fence that were seen. One thread owns it.

    Attributes:
        epoch: What an older epoch granted is refused.
        fence: Commands of a controller with a lower fence are ignored.
        draining: Nothing new is taken.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.fence = 0
        self.draining = False
        self._by_name: dict[str, Resident] = {}

    @property
    def all(self) -> tuple[Resident, ...]:
        """Every resident revision, failed ones included, in the order in which they came."""
        return tuple(self._by_name.values())

    @property
    def serving(self) -> bool:
        """Whether a job could be taken: some revision is active, and the worker is not draining."""
        return not self.draining and any(one.phase is Phase.ACTIVE for one in self.all)

    def find(self, revision: str) -> Resident | None:
        """The revision, or None."""
        return self._by_name.get(revision)

    def begin(self, model: str, revision: str, *, staging: bool = False) -> None:
        """Enters FETCH; a failed revision may begin again, and a staged one goes on so.

        Raises:
            InternalError: It is here already.
        """
        known = self._by_name.get(revision)
        if known is not None and Phase.FETCH not in NEXT[known.phase]:
            raise InternalError(f"Revision {revision} is here already.")
        self._by_name[revision] = Resident(model, revision, Phase.FETCH, staging=staging)

    def enter(self, revision: str, phase: Phase, *, weights_bytes: int = 0, failure: str = "") -> None:
        """Moves a revision to its next phase.

        Raises:
            InternalError: The table has no such step.
        """
        known = self._by_name.get(revision)
        if known is None or phase not in NEXT[known.phase]:
            raise InternalError(f"Revision {revision} cannot enter {phase}.")
        weights_bytes = weights_bytes or known.weights_bytes
        self._by_name[revision] = replace(known, phase=phase, weights_bytes=weights_bytes, failure=failure)

    def activate(self, revision: str, epoch: int) -> None:
        """The revision serves, from this epoch on; epochs never go back."""
        self.enter(revision, Phase.ACTIVE)
        self.epoch = max(self.epoch, epoch)

    def remove(self, revision: str) -> None:
        """Forgets a revision."""
        self._by_name.pop(revision, None)


@dataclass(frozen=True, slots=True)
class Progressed:
    """A preparation came further: bytes done of bytes to do, 0 where not known."""

    revision: str
    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BecameStaged:
    """A revision's files are here and checked."""

    revision: str


@dataclass(frozen=True, slots=True)
class BecameReady:
    """A revision has generated a token.

    Attributes:
        revision: The revision's name.
        weights_bytes: Memory of the weights.
        phases_s: The duration of each phase in seconds, and of the stages of LOAD, by name in lower case.
    """

    revision: str
    weights_bytes: int
    phases_s: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class BecameActive:
    """A switch is known."""

    revision: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BecameProven:
    """A revision that serves was asked its golden prompts; the reason says why it fell short, if it did."""

    revision: str
    reason: str


@dataclass(frozen=True, slots=True)
class PreparationFailed:
    """A preparation ended in `phase`; the reason is for people and holds no path."""

    revision: str
    phase: Phase
    reason: str


@dataclass(frozen=True, slots=True)
class BecameRetired:
    """A revision's memory is free."""

    revision: str


Report = (
    Progressed | BecameStaged | BecameReady | BecameActive | BecameProven | PreparationFailed | BecameRetired
)
