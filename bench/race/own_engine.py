"""Interlock's own engine as a contestant. Owns: how a bench loads a model and steps it.

It is the worker's loop without its streams: the same stepper, scheduler, runner and settings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from bench.race.work import Trace, Work
from services.common.system_clock import SystemClock
from services.worker.adapters import library_environment
from services.worker.config import WorkerConfig
from services.worker.core.admission import JobStart
from services.worker.core.batch import Batch, Choice
from services.worker.core.ports import ModelRunner
from services.worker.core.revision import (
    ComputeDtype,
    ModelFacts,
    Quantization,
    RevisionFile,
    RevisionSpec,
)
from services.worker.core.sequence import Output, SequenceKey, SequenceStart
from services.worker.core.stepper import AddCredit, Admit, Host, Stepper
from services.worker.core.warmup import warm

if TYPE_CHECKING:
    from services.worker.adapters.torch_runner import TorchRunner

REVISION = "bench"

# What a worker that nobody configured uses.
_SETTINGS = WorkerConfig(mesh_token=SecretStr(""))


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to hold and compute a model.

    Attributes:
        quantization: How weights are held.
        dtype: The format of activations.
        lean: Whether the lean forward runs what it can; without it everything runs as modules.
    """

    quantization: Quantization
    dtype: ComputeDtype = ComputeDtype.AUTO
    lean: bool = True


# The ways by the names that the command line has for them.
MODES = {
    "int8": Mode(Quantization.INT8),
    "bf16": Mode(Quantization.NONE, ComputeDtype.BF16),
    "fp32": Mode(Quantization.NONE, ComputeDtype.FP32),
    "nf4": Mode(Quantization.NF4),
    "fp4": Mode(Quantization.FP4),
    "int8-bitsandbytes": Mode(Quantization.INT8, lean=False),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a contestant may use.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        threads: Threads of a forward pass on CPU.
        slots: Most sequences at once.
        kv_bytes: Budget of the KV cache.
    """

    device: str
    threads: int
    slots: int
    kv_bytes: int


def load(directory: Path, mode: Mode, machine: Machine) -> TorchRunner:
    """A runner for the model in `directory`, loaded and warmed up as a worker does it."""
    # As in the worker: the libraries read their environment when they are imported.
    library_environment.prepare()
    from services.worker.adapters import torch_compute  # noqa: PLC0415 - see above
    from services.worker.adapters.torch_loader import TorchLoader, TorchSettings  # noqa: PLC0415 - as above

    device = torch_compute.choose_device(machine.device)
    settings = TorchSettings(device, machine.threads, machine.slots, lambda: machine.kv_bytes, mode.lean)
    loader = TorchLoader(settings)
    files = tuple(RevisionFile(path.name, path.stat().st_size, "") for path in directory.iterdir())
    spec = RevisionSpec(REVISION, REVISION, files, mode.quantization, mode.dtype)
    loader.verify(directory, spec)
    runner = loader.load(directory, spec)
    warm(runner)
    return runner


class OwnEngine:
    """A loaded model behind the worker's stepper.

    Args:
        runner: The model.
        prefix_share: The part of the KV cache that ended sequences may keep. A race keeps none: the same
            prompts come again and again.
    """

    def __init__(self, runner: ModelRunner, *, prefix_share: float = 0.0) -> None:
        self._stepper = Stepper(
            slots=1 << 16,
            clock=SystemClock(),
            chunk_tokens=_SETTINGS.prefill_chunk_tokens,
            shared_chunk_tokens=_SETTINGS.prefill_chunk_shared_tokens,
            prefix_cache_share=prefix_share,
        )
        self._stepper.handle(Host(REVISION, _Endless(runner)))
        self._jobs = 0

    def run(self, work: Work) -> Trace:
        """Does the work."""
        return self.answer(work.prompts, work.new_tokens)[1]

    def run_gathered(self, work: Work) -> Trace:
        """Does the work, but no sequence goes on before every one has its first token."""
        began_s = time.perf_counter()
        keys = [self._admit(prompt, work.new_tokens, (), credit=1) for prompt in work.prompts]
        firsts = self._finish(keys, began_s)[1]
        for key in keys:
            self._stepper.handle(AddCredit(key, work.new_tokens - 1))
        rest = self._finish(keys, began_s)[1]
        pairs = zip(firsts.arrivals_s, rest.arrivals_s, strict=True)
        return Trace(tuple(first + later for first, later in pairs))

    def answer(
        self,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        emitted: Sequence[tuple[int, ...]] = (),
    ) -> tuple[list[list[int]], Trace]:
        """Greedy answers to prompts that run together, and when their tokens arrived.

        Args:
            prompts: The prompts.
            new_tokens: Tokens of each answer, those included that are there already.
            emitted: For each prompt what some engine has answered already; left out: nothing.
        """
        began_s = time.perf_counter()
        keys = [
            self._admit(prompt, new_tokens, emitted[place] if emitted else (), credit=new_tokens)
            for place, prompt in enumerate(prompts)
        ]
        return self._finish(keys, began_s)

    def _finish(self, keys: Sequence[SequenceKey], began_s: float) -> tuple[list[list[int]], Trace]:
        """Steps until there is nothing to do; returns what came of these sequences meanwhile."""
        answers: dict[SequenceKey, list[int]] = {key: [] for key in keys}
        arrivals: dict[SequenceKey, list[float]] = {key: [] for key in keys}
        while self._stepper.has_work:
            events = self._stepper.step()
            now_s = time.perf_counter() - began_s
            for output in map(_output, events):
                answers[output.key].extend(output.token_ids)
                arrivals[output.key].extend([now_s] * len(output.token_ids))
        return list(answers.values()), Trace(tuple(map(tuple, arrivals.values())))

    def _admit(
        self, prompt: tuple[int, ...], new_tokens: int, emitted: tuple[int, ...], *, credit: int
    ) -> SequenceKey:
        self._jobs += 1
        key = SequenceKey(1, str(self._jobs))
        start = SequenceStart(key, prompt, new_tokens, emitted, credit_tokens=credit)
        for refusal in self._stepper.handle(Admit(JobStart(REVISION, REVISION, 1, (start,)))):
            raise RuntimeError(f"The KV cache has no room for all sequences: {refusal}.")
        return key


class _Endless:
    """A runner without tokens that end an answer: every contestant writes the same number of them."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    @property
    def facts(self) -> ModelFacts:
        """See `ModelRunner.facts`."""
        return replace(self._runner.facts, end_ids=frozenset())

    def rehearse(self) -> None:
        """See `ModelRunner.rehearse`."""
        self._runner.rehearse()

    def step(self, batch: Batch) -> Sequence[Choice]:
        """See `ModelRunner.step`."""
        return self._runner.step(batch)

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._runner.close()


def _output(event: object) -> Output:
    if not isinstance(event, Output):
        raise RuntimeError(f"The engine did not do its work: {event}")  # noqa: TRY004 - no caller's mistake
    return event
