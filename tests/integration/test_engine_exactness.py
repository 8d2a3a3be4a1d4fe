"""The engine with the real model: tokens depend on the request alone, and on no neighbour, cut or worker."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.format import Format, FormatKind
from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec
from services.worker.core.sequence import Finish, Sampling
from tests.fixtures.engine_world import SOAK_FACTOR, Asked, EngineWorld, engine_world
from tests.fixtures.mesh import fetched_model

# A test loads, or runs, dozens of answers on two cores that others may use too.
pytestmark = pytest.mark.timeout(300 * SOAK_FACTOR)

REVISION = "real"
MODES = [Quantization.NONE, Quantization.INT8]
TEXT = Path(transformers.__file__).read_text()
SCHEMA = Format(
    FormatKind.JSON_SCHEMA,
    (
        json.dumps(
            {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}},
                "required": ["ok"],
                "additionalProperties": False,
            }
        ),
    ),
)
# Answers are short, for each is made alone too; `make soak` makes longer ones.
TOKENS = 3 if SOAK_FACTOR == 1 else 16
STRUCTURED_TOKENS = 16
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.3}
BIAS = ((198, 2.5), (28, -4.0), (30, 1.5))

Load = Callable[[Quantization], TorchRunner]


@pytest.fixture(scope="module")
def directory() -> Path:
    """The demo model."""
    return fetched_model()


@pytest.fixture(scope="module")
def load(directory: Path) -> Load:
    """Loads the model in fp32 or int8, each once."""
    loaded: dict[Quantization, TorchRunner] = {}

    def loading(quantization: Quantization) -> TorchRunner:
        if quantization not in loaded:
            settings = TorchSettings(torch.device("cpu"), 2, 64, lambda: 1 << 30)
            files = tuple(RevisionFile(path.name, path.stat().st_size, "") for path in directory.iterdir())
            spec = RevisionSpec("m", REVISION, files, quantization, ComputeDtype.FP32, context_tokens=1_024)
            loaded[quantization] = TorchLoader(settings).load(directory, spec)
        return loaded[quantization]

    return loading


def greedy_requests(directory: Path) -> list[Asked]:
    """32 greedy requests of 5 to 200 prompt tokens: plain, penalized, biased, stopped, held to a schema."""
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT[:20_000]).ids
    draw = random.Random(3)  # noqa: S311 - test data
    lengths = [5, 200, 97, *(draw.randrange(5, 24) for _ in range(29))]
    return [_varied(number, _cut(ids, draw, length)) for number, length in enumerate(lengths)]


def seeded_requests(directory: Path) -> list[Asked]:
    """6 of them, with noise: filters, penalties, bias and the schema."""
    samplings = [
        Sampling(0.9, top_k=40, top_p=0.95, seed=1),
        Sampling(1.3, min_p=0.02, seed=2**63 + 5),
        Sampling(0.8, seed=3, **PENALTIES),  # type: ignore[arg-type] # the values are floats
        Sampling(1.0, seed=4, logit_bias=BIAS),
        Sampling(1.1, top_p=0.9, seed=5),
        Sampling(1.0, seed=6),
    ]
    picked = greedy_requests(directory)[3:9]
    return [
        replace(one, name=f"seeded-{number}", sampling=sampling, form=SCHEMA if number > 3 else None)
        for number, (one, sampling) in enumerate(zip(picked, samplings, strict=True))
    ]


def _cut(ids: list[int], draw: random.Random, length: int) -> tuple[int, ...]:
    first = draw.randrange(len(ids) - length)
    return tuple(ids[first : first + length])


def _varied(number: int, prompt: tuple[int, ...]) -> Asked:
    """Each eighth request is of one special kind; half of them are plain."""
    asked = Asked(f"greedy-{number}", prompt, TOKENS + number % 5)
    match number % 8:
        case 4:
            return replace(asked, sampling=Sampling(**PENALTIES))  # type: ignore[arg-type] # as above
        case 5:
            return replace(asked, sampling=Sampling(logit_bias=BIAS))
        case 6:
            return replace(asked, form=SCHEMA, tokens=STRUCTURED_TOKENS)
        case 7:
            return replace(asked, stop_after=3)
        case _:
            return asked


async def each_alone(world: EngineWorld, asked: list[Asked]) -> dict[str, list[int]]:
    """The requests one after the other, each with the engine to itself."""
    found: dict[str, list[int]] = {}
    for one in asked:
        answers = await world.answer(REVISION, [replace(one, stop_after=0)])
        found[one.name] = answers[one.name].tokens
    return found


@pytest.fixture(scope="module")
def alone(load: Load, directory: Path) -> Callable[[Quantization], Any]:
    """Answers of the requests when nobody is beside them, found once a mode."""
    known: dict[Quantization, dict[str, list[int]]] = {}

    async def find(mode: Quantization) -> dict[str, list[int]]:
        if mode not in known:
            async with engine_world() as world:
                world.host(REVISION, load(mode), directory)
                asked = [*greedy_requests(directory), *seeded_requests(directory)]
                known[mode] = await each_alone(world, asked)
        return known[mode]

    return find


@pytest.mark.parametrize("mode", MODES)
async def test_38_requests_together_equal_each_alone(
    mode: Quantization, load: Load, directory: Path, alone: Callable[[Quantization], Any]
) -> None:
    """32 greedy and 6 seeded requests of mixed lengths: each answer is that of the request alone."""
    asked = [*greedy_requests(directory), *seeded_requests(directory)]
    wanted = await alone(mode)
    async with engine_world() as world:
        world.host(REVISION, load(mode), directory)
        answers = await world.answer(REVISION, asked)
    for one in asked:
        found = answers[one.name]
        if one.stop_after:
            # The engine may be a step or two further when the cancel arrives; nothing else may differ.
            assert found.tokens == wanted[one.name][: len(found.tokens)], one.name
            assert len(found.tokens) >= min(one.stop_after, len(wanted[one.name]))
        else:
            assert found.tokens == wanted[one.name], one.name
            assert found.finish in {Finish.STOP, Finish.LENGTH}
    assert len({tuple(found.tokens) for found in answers.values()}) > len(asked) // 2, "they say the same"


@pytest.mark.parametrize("mode", MODES)
async def test_answers_cut_anywhere_go_on_in_another_engine(
    mode: Quantization, load: Load, directory: Path, alone: Callable[[Quantization], Any]
) -> None:
    """Plain, penalized, biased, structured and seeded answers, cut at random, go on as if in one piece."""
    wanted = await alone(mode)
    asked = [replace(one, stop_after=0) for one in greedy_requests(directory)[3:11]]
    asked += seeded_requests(directory)
    draw = random.Random(11)  # noqa: S311 - test data
    for _ in range(SOAK_FACTOR):
        going = [one for one in asked if len(wanted[one.name]) > 1]
        emitted = {
            one.name: tuple(wanted[one.name][: draw.randrange(1, len(wanted[one.name]))]) for one in going
        }
        async with engine_world(chunk_tokens=96, shared_chunk_tokens=48) as world:
            world.host(REVISION, load(mode), directory)
            answers = await world.answer(REVISION, going, emitted)
        for one in going:
            assert [*emitted[one.name], *answers[one.name].tokens] == wanted[one.name], one.name


async def test_fp32_equals_generate(
    load: Load, directory: Path, alone: Callable[[Quantization], Any]
) -> None:
    """Greedy answers in fp32, short and long prompts: what transformers generates, token for token."""
    wanted = await alone(Quantization.NONE)
    factory: Any = transformers.AutoModelForCausalLM
    module = factory.from_pretrained(directory, dtype=torch.float32)
    plain = [one for one in greedy_requests(directory) if one.sampling == Sampling() and one.form is None]
    for one in plain[:5]:
        assert wanted[one.name] == _generated(module, one, load(Quantization.NONE).facts.end_ids)


def _generated(module: Any, asked: Asked, end_ids: frozenset[int]) -> list[int]:
    ids = torch.tensor([asked.prompt])
    with torch.inference_mode():
        whole = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.tokens,
            do_sample=False,
            pad_token_id=0,
        )
    answer = [int(token) for token in whole[0, len(asked.prompt) :]]
    ends = [at for at, token in enumerate(answer) if token in end_ids]
    return answer[: ends[0]] if ends else answer


async def test_structured_answers_are_whole(directory: Path, alone: Callable[[Quantization], Any]) -> None:
    """What the schema held is JSON of its shape: the comparison above was not of empty answers."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    wanted = await alone(Quantization.INT8)
    held = [one.name for one in greedy_requests(directory) if one.form is not None]
    whole = [json.loads(tokenizer.decode(wanted[name])) for name in held]
    assert len(whole) == 4
    assert all(set(one) == {"ok"} for one in whole)
