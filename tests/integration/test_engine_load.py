"""The engine under random load and under two revisions: nothing is left behind, and nobody starves."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.worker.adapters.process_memory import resident_bytes
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.batch import Batch, Choice
from services.worker.core.format import Format, FormatKind
from services.worker.core.revision import ComputeDtype, Quantization
from services.worker.core.sequence import Finish, Sampling
from tests.fakes import tiny_models
from tests.fixtures import tiny_tokenizer
from tests.fixtures.engine_world import SOAK_FACTOR, Asked, EngineWorld, engine_world

pytestmark = pytest.mark.timeout(300 * SOAK_FACTOR)

REQUESTS = 150 if SOAK_FACTOR == 1 else 1_000
# The default alone, or both that are exact.
MODES = [Quantization.INT8] if SOAK_FACTOR == 1 else [Quantization.INT8, Quantization.NONE]
TOGETHER = 25
SLOTS = 8
SHAPES = (
    None,
    None,
    Format(FormatKind.REGEX, ("[a-f]{2,12}",)),
    Format(FormatKind.CHOICE, ("yes", "no", "perhaps")),
    Format(FormatKind.JSON_SCHEMA, ('{"type": "object", "properties": {"a": {"type": "integer"}}}',)),
)

Make = Callable[[str, Quantization], tuple[TorchRunner, Path]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes and loads a tiny model that has a tokenizer."""

    def making(name: str, quantization: Quantization) -> tuple[TorchRunner, Path]:
        directory = tmp_path / name
        if not directory.exists():
            tiny_models.save(name, directory, speaks=True)
        spec = tiny_models.spec_of(directory, quantization, ComputeDtype.FP32)
        settings = TorchSettings(torch.device("cpu"), 1, SLOTS, lambda: 1 << 22)
        return TorchLoader(settings).load(directory, spec), directory

    return making


def prompt_of(draw: random.Random, tokens: int) -> tuple[int, ...]:
    """Random ids; some prompts begin alike, so that prefixes are found."""
    shared = [7 * place % 200 + 3 for place in range(48)] if draw.random() < 0.3 else []
    return (*shared, *(draw.randrange(3, 250) for _ in range(tokens)))


def random_request(draw: random.Random, name: str) -> Asked:
    """Any length, any sampling, structured or not, stopped or not."""
    sampling = Sampling(
        draw.choice((0.0, 0.8, 1.3)),
        draw.choice((0, 20)),
        seed=draw.randrange(1 << 64),
        repetition_penalty=draw.choice((1.0, 1.2)),
        logit_bias=draw.choice(((), ((5, 2.0),))),
    )
    asked = Asked(name, prompt_of(draw, draw.randrange(1, 150)), draw.randrange(1, 40), sampling)
    return replace(asked, form=draw.choice(SHAPES), stop_after=draw.choice((0, 0, draw.randrange(1, 20))))


async def carry(world: EngineWorld, draw: random.Random, requests: int) -> list[Finish | None]:
    """Requests in crowds: some answered to their end, some stopped, some whose gateway goes away."""
    ends: list[Finish | None] = []
    for first in range(0, requests, TOGETHER):
        crowd = [random_request(draw, f"{first}-{number}") for number in range(TOGETHER)]
        # As many as there are slots, for the engine has no queue: gateways have one.
        for at in range(0, TOGETHER, SLOTS):
            ends += await serve(world, draw, crowd[at : at + SLOTS])
    return ends


async def serve(world: EngineWorld, draw: random.Random, crowd: list[Asked]) -> list[Finish | None]:
    """One crowd; now and then its session ends at some moment, whatever it has running."""
    answering = asyncio.create_task(world.answer("r", crowd))
    if draw.random() < 0.2:
        for _ in range(draw.randrange(40)):
            await asyncio.sleep(0)
        answering.cancel()
    (outcome,) = await asyncio.gather(answering, return_exceptions=True)
    await until_idle(world)
    if isinstance(outcome, asyncio.CancelledError):
        return [None] * len(crowd)
    assert not isinstance(outcome, BaseException), outcome
    return [answer.finish for answer in outcome.values()]


async def until_idle(world: EngineWorld) -> None:
    """Waits until the step thread has heard of every end."""
    async with asyncio.timeout(10):
        # The step thread signals no event at its rest.
        while world.scheduler("r").running or world.engine._mailbox._commands:  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


def settled_bytes() -> int:
    """What the process holds once the allocator has given back what nothing uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


@pytest.mark.parametrize("quantization", MODES)
async def test_random_requests_leave_nothing_behind(quantization: Quantization, make: Make) -> None:
    """Lengths, cancels, stops, lost sessions, shapes: no row, task, thread or memory stays."""
    runner, directory = make("llama", quantization)
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    draw = random.Random(REQUESTS)  # noqa: S311 - test data
    async with engine_world(slots=SLOTS, prefixes=0.5) as world:
        world.host("r", runner, directory)
        await carry(world, draw, 100)
        before = settled_bytes()
        ends = await carry(world, draw, REQUESTS)
        after = settled_bytes()
        assert {Finish.STOP, Finish.LENGTH, Finish.CANCELLED, None} <= set(ends)
        assert Finish.ERROR not in ends
        scheduler, pulse = world.scheduler("r"), world.engine.pulse
        assert (scheduler.running, scheduler._rows.running, list(scheduler._turns)) == (0, [], [])
        assert (pulse.running, pulse.free_slots, dict(pulse.paused)) == (0, SLOTS, {})
        assert not world.engine._sessions
        await world.engine.unload("r")
        assert runner._cache.held_bytes == 0
    assert after < 1.05 * before, f"{before} bytes became {after}"
    assert asyncio.all_tasks() == tasks
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("asyncio-waitpid"):
            # It waits for a child that has been killed, and ends with it.
            await asyncio.to_thread(thread.join, 10)
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not [name for name in left if not name.startswith("asyncio_")], left


async def test_two_revisions_share_the_steps(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one revision decodes for long, the other's answer comes step by step beside it."""
    # Whose step each was; the thread that makes them does not wait for anybody who looks.
    steps: list[str] = []

    def logged(name: str, step: Callable[[Batch], Sequence[Choice]]) -> Callable[[Batch], Sequence[Choice]]:
        def stepping(batch: Batch) -> Sequence[Choice]:
            steps.append(name)
            return step(batch)

        return stepping

    async with engine_world(slots=SLOTS) as world:
        for name in ("llama", "gpt2"):
            runner, directory = make(name, Quantization.NONE)
            monkeypatch.setattr(runner, "step", logged(name, runner.step))
            world.host(name, runner, directory)
        draw = random.Random(5)  # noqa: S311 - test data
        # The bias keeps end tokens away.
        sampling = Sampling(1.0, seed=3, logit_bias=((tiny_tokenizer.END, -100.0), (2, -100.0)))
        long = [Asked(f"long-{number}", prompt_of(draw, 5), 300, sampling) for number in range(4)]
        short = Asked("short", prompt_of(draw, 5), 30, sampling)
        alone = await world.answer("gpt2", [short])
        running = asyncio.create_task(world.answer("llama", long))
        while world.engine.pulse.running < len(long):  # noqa: ASYNC110 - the step thread signals no event
            await asyncio.sleep(0)
        began = len(steps)
        found = await world.answer("gpt2", [short])
        assert found["short"].tokens == alone["short"].tokens
        answers = await running
        first = steps.index("gpt2", began)
        last = len(steps) - 1 - steps[::-1].index("gpt2")
        # One step of each in every turn.
        assert last - first < 3 * short.tokens
        assert min(steps[first:last].count(name) for name in ("llama", "gpt2")) > short.tokens // 2
        assert "llama" in steps[last:], "the long answers were not running beside the short one"
        assert [len(answer.tokens) for answer in answers.values()] == [300] * 4


async def test_a_revision_retires_while_another_runs(make: Make) -> None:
    """Each has a cache of its own: one is freed, and the other's answers stay what they were."""
    async with engine_world(slots=SLOTS, prefixes=0.5) as world:
        leaving, leaving_at = make("gpt2", Quantization.NONE)
        staying, staying_at = make("llama", Quantization.INT8)
        world.host("old", leaving, leaving_at)
        world.host("new", staying, staying_at)
        draw = random.Random(6)  # noqa: S311 - test data
        asked = [Asked(f"{number}", prompt_of(draw, 9 + number), 60) for number in range(3)]
        wanted = await world.answer("new", asked)
        await world.answer("old", asked)
        assert leaving._cache is not staying._cache
        running = asyncio.create_task(world.answer("new", asked))
        await world.engine.unload("old")
        assert leaving._cache.held_bytes == 0
        answers = await running
        assert {name: one.tokens for name, one in answers.items()} == {
            name: one.tokens for name, one in wanted.items()
        }
        assert staying._cache.held_bytes > 0
