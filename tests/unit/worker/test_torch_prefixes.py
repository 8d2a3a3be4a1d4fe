"""Prefixes and preemption over real architectures: what is copied or computed again changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Finish, Output, Sampling, SequenceKey, SequenceStart
from tests.fakes import tiny_models

SAMPLINGS = [Sampling(), Sampling(0.9, 20, 0.9, 0.02, seed=7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TorchRunner]:
    """Makes each tiny model once."""
    made: dict[str, TorchRunner] = {}

    def make(name: str) -> TorchRunner:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = load(name, directory)
        return made[name]

    return make


def load(name: str, directory: Path, kv_bytes: int = 1 << 24) -> TorchRunner:
    """A tiny model with a cache of so many bytes."""
    spec = tiny_models.save(name, directory)
    settings = TorchSettings(torch.device("cpu"), threads=1, slots=8, kv_bytes=lambda: kv_bytes)
    return TorchLoader(settings).load(directory, spec)


def scheduler_of(runner: TorchRunner, *, share: float = 0.5) -> Scheduler:
    """A scheduler with short chunks; no end token, so that lengths are as asked."""
    area = runner.facts.kv_tokens
    return Scheduler(Limits(8, area, 32, 16, int(area * share)), frozenset())


def ids(length: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    draw = random.Random(seed)  # noqa: S311 - test data
    return tuple(draw.randrange(3, tiny_models.VOCABULARY) for _ in range(length))


def start(job: str, prompt: Sequence[int], tokens: int, sampling: Sampling) -> SequenceStart:
    """A sequence with enough credit."""
    return SequenceStart(SequenceKey(1, job), tuple(prompt), tokens, (), 10_000, sampling)


def rest(scheduler: Scheduler, runner: TorchRunner) -> list[Output]:
    """Steps until nothing is left to do."""
    outputs: list[Output] = []
    while (batch := scheduler.schedule()) is not None:
        outputs.extend(scheduler.apply(runner.step(batch)))
    assert not any(output.finish is Finish.ERROR for output in outputs)
    return outputs


def tokens_of(outputs: Sequence[Output], job: str) -> list[int]:
    """The tokens of one job."""
    return [token for output in outputs if output.key.job == job for token in output.token_ids]


def alone(runner: TorchRunner, prompt: Sequence[int], tokens: int, sampling: Sampling) -> list[int]:
    """What a sequence gets in an empty cache that keeps nothing."""
    scheduler = scheduler_of(runner, share=0)
    scheduler.admit(start("a", prompt, tokens, sampling))
    return tokens_of(rest(scheduler, runner), "a")


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS))
def test_a_hit_gives_the_tokens_of_a_miss(
    name: str, sampling: Sampling, model: Callable[[str], TorchRunner]
) -> None:
    """A chat's second turn, a prompt cut within a row, and twins of a row that runs; windows included."""
    runner = model(name)
    scheduler = scheduler_of(runner)
    prompt = ids(70, seed=2)
    scheduler.admit(start("first", prompt, 12, sampling))
    first = tokens_of(rest(scheduler, runner), "first")
    second = (*prompt, *first, *ids(9, seed=3))
    branch = (*prompt[:40], *ids(30, seed=4))
    for job, asked in (("second", second), ("branch", branch), ("twin", branch)):
        scheduler.admit(start(job, asked, 10, sampling))
    outputs = rest(scheduler, runner)
    cached = {one.key.job: one.cached_prompt_tokens for one in reversed(outputs)}
    assert (cached["second"], cached["branch"]) == (81, 40)
    assert cached["twin"] > 50
    assert tokens_of(outputs, "second") == alone(runner, second, 10, sampling)
    assert tokens_of(outputs, "branch") == alone(runner, branch, 10, sampling)
    assert tokens_of(outputs, "twin") == tokens_of(outputs, "branch")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_preempted_sequences_get_their_own_tokens(name: str, tmp_path: Path) -> None:
    """In a cache for a third of them, greedy and seeded ones are as they are alone, inside the bytes."""
    kv_bytes = 512 * 320
    runner = load(name, tmp_path, kv_bytes)
    scheduler = scheduler_of(runner)
    starts = [start(str(number), ids(8 + number, number), 90, SAMPLINGS[number % 2]) for number in range(6)]
    for one in starts:
        scheduler.admit(one)
    outputs: list[Output] = []
    preempted = 0
    while (batch := scheduler.schedule()) is not None:
        outputs.extend(scheduler.apply(runner.step(batch)))
        assert runner._cache.held_bytes <= kv_bytes
        preempted = max([preempted, *(live.preemptions for live in scheduler._live.values())])
    assert preempted > 0
    for one in starts:
        assert tokens_of(outputs, one.key.job) == alone(runner, one.prompt_ids, 90, one.sampling)


def test_many_random_requests_leave_the_cache_as_it_was(model: Callable[[str], TorchRunner]) -> None:
    """Prompts that begin alike, arrivals and cancels at random: each answer is its own, nothing is left."""
    runner, chance = model("llama"), random.Random(4)  # noqa: S311 - test data
    scheduler = scheduler_of(runner)
    waiting = [
        start(
            str(number),
            (*ids(60, number % 4)[: chance.randrange(60)], *ids(5, number)),
            8,
            SAMPLINGS[number % 2],
        )
        for number in range(60)
    ]
    asked = {one.key: one for one in waiting}
    outputs: list[Output] = []
    while waiting or scheduler.running:
        if waiting and scheduler.fits(waiting[-1]) and chance.random() < 0.6:
            scheduler.admit(waiting.pop())
        if scheduler.keys and chance.random() < 0.02:
            outputs += scheduler.end(chance.choice(scheduler.keys), Finish.CANCELLED)
        if (batch := scheduler.schedule()) is not None:
            outputs += scheduler.apply(runner.step(batch))
    assert sorted(one.key.job for one in outputs if one.finish) == sorted(key.job for key in asked)
    for key, one in asked.items():
        found = tokens_of(outputs, key.job)
        assert found == alone(runner, one.prompt_ids, 8, one.sampling)[: len(found)]
    assert sum(one.cached_prompt_tokens > 0 for one in outputs) > 10
    scheduler.clear()
    assert (scheduler.running, scheduler.cached_rows) == (0, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_rows_that_decode_in_two_groups_get_the_same_tokens(
    name: str, model: Callable[[str], TorchRunner]
) -> None:
    """Long rows between short ones, passed apart: every row has its own logits."""
    runner = model(name)
    starts = [start(str(n), ids(90 if n in {1, 3} else 8, n), 20, SAMPLINGS[n % 2]) for n in range(5)]
    found: list[list[Output]] = []
    for pass_positions in (runner._pass_positions, 1):
        runner._pass_positions = pass_positions
        scheduler = scheduler_of(runner)
        for one in starts:
            scheduler.admit(one)
        found.append(rest(scheduler, runner))
    for one in starts:
        assert tokens_of(found[0], one.key.job) == tokens_of(found[1], one.key.job)
