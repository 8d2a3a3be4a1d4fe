"""Whatever the architecture, the neighbours and the cut: another worker goes on with the same tokens."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.revision import ComputeDtype, Quantization
from services.worker.core.sequence import Sampling
from tests.fakes import tiny_models
from tests.fixtures.engine_world import SOAK_FACTOR, Asked, engine_world

pytestmark = pytest.mark.timeout(300 * SOAK_FACTOR)

# int8 is exact where the lean forward serves the model; in single precision every architecture is.
KINDS = [(name, Quantization.NONE) for name in sorted(tiny_models.CONFIGS)]
KINDS += [(name, Quantization.INT8) for name in ("llama", "llama-wide", "mistral-full", "qwen2", "qwen3")]
EXAMPLES = 15 if SOAK_FACTOR == 1 else 60 * SOAK_FACTOR

Workers = tuple[TorchRunner, TorchRunner, Path]


@functools.cache
def home() -> tempfile.TemporaryDirectory[str]:
    """Where the models of this module lie; gone with the process."""
    return tempfile.TemporaryDirectory(prefix="engine-")


@functools.cache
def workers_of(name: str, quantization: Quantization) -> Workers:
    """Two loads of the same weights: two workers."""
    directory = Path(home().name) / name
    if not directory.exists():
        tiny_models.save(name, directory)
    spec = tiny_models.spec_of(directory, quantization, ComputeDtype.FP32)
    one, other = (
        TorchLoader(TorchSettings(torch.device("cpu"), 1, 8, lambda: 1 << 22)).load(directory, spec)
        for _ in range(2)
    )
    return one, other, directory


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.2]),
    top_k=st.sampled_from([0, 12]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([(), ((5, 2.0), (9, -50.0))]),
)
prompts = st.lists(st.integers(3, tiny_models.VOCABULARY - 1), min_size=1, max_size=90).map(tuple)
requests = st.lists(st.tuples(prompts, samplings, st.integers(2, 24)), min_size=1, max_size=6)


async def answers_of(
    runner: TorchRunner, place: Path, asked: list[Asked], emitted: dict[str, tuple[int, ...]], chunk: int
) -> dict[str, tuple[int, ...]]:
    """All of what a fresh engine says to requests that run together, what they began with included."""
    async with engine_world(slots=8, chunk_tokens=chunk, shared_chunk_tokens=chunk) as world:
        world.host("tiny", runner, place)
        answers = await world.answer("tiny", asked, emitted)
    return {name: (*emitted.get(name, ()), *answer.tokens) for name, answer in answers.items()}


@settings(max_examples=EXAMPLES, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(KINDS),
    wanted=requests,
    cut=st.floats(0, 1),
    chunks=st.tuples(st.integers(5, 64), st.integers(5, 64)),
)
def test_alone_together_and_cut_are_the_same(
    kind: tuple[str, Quantization],
    wanted: list[tuple[tuple[int, ...], Sampling, int]],
    cut: float,
    chunks: tuple[int, int],
) -> None:
    """The answer alone, beside the others, and cut and continued by a second worker is one and the same."""
    first, second, place = workers_of(*kind)
    asked = [Asked(str(at), ids, tokens, how) for at, (ids, how, tokens) in enumerate(wanted)]
    together = asyncio.run(answers_of(first, place, asked, {}, chunks[0]))
    mine = asked[0]
    assert asyncio.run(answers_of(second, place, [mine], {}, chunks[1])) == {mine.name: together[mine.name]}
    emitted = {name: tokens[: int(cut * len(tokens))] for name, tokens in together.items()}
    assert asyncio.run(answers_of(second, place, asked, emitted, chunks[1])) == together
