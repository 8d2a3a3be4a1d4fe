"""The engine on a CUDA device: every quantization loads there, fp32 is exact, and batching pays."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.revision import ComputeDtype, Quantization
from services.worker.core.sequence import Sampling
from tests.fakes import tiny_models
from tests.fixtures.engine_world import Asked, EngineWorld, engine_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

END_BIAS = Sampling(logit_bias=((2, -100.0),))
SEEDED = Sampling(1.0, top_p=0.9, seed=7, logit_bias=((2, -100.0),))


def load(directory: Path, quantization: Quantization, dtype: ComputeDtype) -> TorchRunner:
    """The tiny model on the device."""
    spec = tiny_models.spec_of(directory, quantization, dtype)
    settings = TorchSettings(torch.device("cuda"), 1, 32, lambda: 1 << 26)
    return TorchLoader(settings).load(directory, spec)


def asked(tokens: int = 16) -> list[Asked]:
    """16 requests of mixed lengths, half of them seeded."""
    return [
        Asked(
            str(number),
            tuple(3 + (7 * place + number) % 90 for place in range(3 + 5 * number)),
            tokens,
            SEEDED if number % 2 else END_BIAS,
        )
        for number in range(16)
    ]


async def one_by_one(world: EngineWorld, wanted: list[Asked]) -> dict[str, list[int]]:
    """Each request alone."""
    found: dict[str, list[int]] = {}
    for one in wanted:
        found[one.name] = (await world.answer("r", [one]))[one.name].tokens
    return found


@pytest.mark.parametrize("quantization", [one for one in Quantization if one is not Quantization.AUTO])
async def test_each_quantization_answers_on_the_device(quantization: Quantization, tmp_path: Path) -> None:
    """Plain, int8, nf4 and fp4 weights load, and every answer has its length."""
    tiny_models.save("llama", tmp_path)
    async with engine_world(slots=32) as world:
        world.host("r", load(tmp_path, quantization, ComputeDtype.AUTO), tmp_path)
        answers = await world.answer("r", asked())
    assert all(len(answer.tokens) == 16 for answer in answers.values())


async def test_fp32_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """In single precision a request's tokens are those it has alone, greedy or seeded."""
    tiny_models.save("llama", tmp_path)
    async with engine_world(slots=32) as world:
        world.host("r", load(tmp_path, Quantization.NONE, ComputeDtype.FP32), tmp_path)
        together = await world.answer("r", asked())
        alone = await one_by_one(world, asked())
    assert {name: answer.tokens for name, answer in together.items()} == alone


async def test_16_together_are_faster_than_one_by_one(tmp_path: Path) -> None:
    """Batching pays: 16 answers at once take less time than one after the other."""
    tiny_models.save("llama", tmp_path)
    async with engine_world(slots=32) as world:
        world.host("r", load(tmp_path, Quantization.NONE, ComputeDtype.AUTO), tmp_path)
        await world.answer("r", asked())
        began_s = time.monotonic()
        await world.answer("r", asked(64))
        together_s = time.monotonic() - began_s
        began_s = time.monotonic()
        await one_by_one(world, asked(64))
        alone_s = time.monotonic() - began_s
    assert together_s < alone_s
