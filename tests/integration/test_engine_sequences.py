"""Several sequences of one prompt with a real model: each is a function of seed and number alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.admission import JobStart
from services.worker.core.sequence import Sampling, SequenceKey, SequenceStart
from tests.fakes import tiny_models
from tests.fixtures.engine_world import EngineWorld, engine_world

PROMPT = tuple(range(5, 75))
SEEDED = Sampling(1.1, top_p=0.97, seed=41)
PENALIZED = replace(SEEDED, repetition_penalty=1.3, frequency_penalty=0.4)
TOKENS = 24

Tokens = dict[int, tuple[int, ...]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchRunner, Path]:
    """A random llama in fp32, and where it lies."""
    directory = tmp_path_factory.mktemp("several")
    spec = tiny_models.save("llama", directory)
    loader = TorchLoader(TorchSettings(torch.device("cpu"), 1, 8, lambda: 1 << 22))
    return loader.load(directory, spec), directory


async def answer(
    world: EngineWorld, n: int, sampling: Sampling, emitted: Mapping[int, tuple[int, ...]] | None = None
) -> Tokens:
    """The tokens of each sequence, with what they began with."""
    session, said = world.engine.open_session(), dict(emitted or {})
    first = SequenceStart(SequenceKey(session.number, "j"), PROMPT, TOKENS, (), TOKENS, sampling)
    starts = tuple(
        replace(first, key=replace(first.key, sequence=at), emitted_ids=said.get(at, ())) for at in range(n)
    )
    session.start(JobStart("m", "tiny", 1, starts))
    found: Tokens = {at: said.get(at, ()) for at in range(n)}
    ended = 0
    async with asyncio.timeout(60):
        while ended < n:
            letter = await session.receive()
            assert letter is not None
            assert not letter.refusals
            for output in letter.outputs:
                found[output.key.sequence] += output.token_ids
                ended += output.finish is not None
    session.close()
    return found


@pytest.mark.parametrize("prefixes", [0.0, 0.5], ids=["each computes its prompt", "they share it"])
@pytest.mark.parametrize("sampling", [SEEDED, PENALIZED], ids=["plain", "penalized"])
async def test_sequences_are_those_of_their_seed(
    runner: tuple[TorchRunner, Path], sampling: Sampling, prefixes: float
) -> None:
    """The first is what a request for one gets; each is the same beside any number, and unlike the others."""
    async with engine_world(slots=8, prefixes=prefixes) as world:
        world.host("tiny", *runner)
        one = await answer(world, 1, sampling)
        three, four = await answer(world, 3, sampling), await answer(world, 4, sampling)
        again = await asyncio.gather(answer(world, 4, sampling), answer(world, 3, sampling))
        other = await answer(world, 2, replace(sampling, seed=42))
    assert three[0] == one[0]
    assert four | three == four
    assert tuple(again) == (four, three)
    assert len(set(four.values())) == 4
    assert not set(other.values()) & set(four.values())


async def test_greedy_sequences_are_equal(runner: tuple[TorchRunner, Path]) -> None:
    """Without noise there is one answer."""
    async with engine_world(slots=8, prefixes=0.5) as world:
        world.host("tiny", *runner)
        said = await answer(world, 3, Sampling())
        assert set(said.values()) == {(await answer(world, 1, Sampling()))[0]}


async def test_sequences_cut_anywhere_go_on(runner: tuple[TorchRunner, Path]) -> None:
    """Another engine goes on with each where it was cut, also where one had not begun."""
    async with engine_world(slots=8, prefixes=0.5) as world:
        world.host("tiny", *runner)
        whole = await answer(world, 3, SEEDED)
    cut = {0: whole[0][:9], 1: (), 2: whole[2][:17]}
    async with engine_world(slots=8, prefixes=0.5) as world:
        world.host("tiny", *runner)
        assert await answer(world, 3, SEEDED, cut) == whole
