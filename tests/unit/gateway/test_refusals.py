"""In a flood, what a crowded queue refused just now is not put to it again; nothing else is kept from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import QueueFull
from services.gateway.core.jobs import Band, Outcome
from services.gateway.core.params import GenerationJob, GenerationParams, SamplingParams
from services.gateway.core.queue_errors import hopeless
from services.gateway.core.refusals import ALIKE_S, FLOOD, FLOOD_WINDOW_S, KEPT_MAX, STANDS_S, Refusals
from services.gateway.core.tenancy import TenantLimits
from tests.fixtures.dispatcher_world import dispatcher_world, job

FULL = QueueFull("full", retry_after_s=3.0)


def flooded(count: int = FLOOD, asked: GenerationJob | None = None) -> Refusals:
    """So many refusals at the same moment, 0."""
    refusals = Refusals()
    for _ in range(count):
        refusals.note(asked or job(), FULL, 0.0)
    return refusals


def test_below_a_flood_every_request_is_put_to_the_queue() -> None:
    """One refusal less is none."""
    assert flooded(FLOOD - 1).recall(job(), 0.0) is None
    assert flooded().recall(job(), 0.0) is not None


def test_a_refusal_stands_for_a_moment() -> None:
    """It is told as it was, to each caller as an error of its own."""
    refusals = flooded()
    first, second = (refusals.recall(job(), STANDS_S / 2) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.message, first.retry_after_s) == (FULL.message, FULL.retry_after_s)
    assert len({id(error) for error in (first, second, FULL)}) == 3
    assert refusals.recall(job(), STANDS_S) is None


LIMITS = TenantLimits(tokens_per_minute=1_000)


@pytest.mark.parametrize(
    "other",
    [
        {"timeout_s": 30.0 + 2 * ALIKE_S},
        {"timeout_s": 1.0},
        {"params": GenerationParams(99, SamplingParams(seed=1))},
        {"prompt_ids": (1,)},
        {"params": GenerationParams(100, SamplingParams(seed=1), n=2)},
        {"limits": LIMITS},
        {"tenant": "bob"},
        {"band": Band.SYSTEM},
        {"model": "n"},
    ],
    ids=[
        "more time",
        "less time",
        "fewer tokens",
        "a shorter prompt",
        "slots",
        "limits",
        "tenant",
        "band",
        "model",
    ],
)
def test_nobody_is_refused_for_another_one(other: dict[str, Any]) -> None:
    """Their prospects may be better, their words would be others: the queue knows."""
    assert flooded().recall(replace(job(), **other), 0.0) is None


def test_whoever_is_alike_and_takes_no_less_is_refused() -> None:
    """More to do; and a deadline that differs by the way here, which of a short one is a part of it."""
    refusals = flooded()
    assert refusals.recall(job(timeout_s=30.0 - ALIKE_S / 2), 0.0) is not None
    assert refusals.recall(job(timeout_s=30.0 + ALIKE_S / 2, prompt_ids=(1,) * 50), 0.0) is not None
    brief = flooded(asked=job(timeout_s=0.1))
    assert brief.recall(job(timeout_s=0.105), 0.0) is not None
    assert brief.recall(job(timeout_s=0.12), 0.0) is None


def test_what_no_minute_could_hold_is_put_to_the_queue() -> None:
    """It has an answer of its own, which says that no waiting helps."""
    refusals = flooded(asked=job(limits=LIMITS))
    assert refusals.recall(job(limits=LIMITS), 0.0) is not None
    assert refusals.recall(job(limits=LIMITS, prompt_ids=(1,) * 1_000), 0.0) is None


def test_a_slot_that_was_missing_for_a_moment_says_nothing_of_the_next_request() -> None:
    """Nobody was ahead; it could just not be done in time any more."""
    refusals = Refusals()
    for _ in range(2 * FLOOD):
        refusals.note(job(), hopeless(0, 0.2, 0.1), 0.0)
    assert refusals.recall(job(), 0.0) is None


def fail() -> None:
    """As the queue does."""
    raise QueueFull("full")


def test_what_is_kept_holds_nothing_of_the_request() -> None:
    """A raised error holds the frames that it came through, and with them the prompt."""
    refusals = Refusals()
    for _ in range(FLOOD):
        with pytest.raises(QueueFull) as caught:
            fail()
        refusals.note(job(), caught.value, 0.0)
    found = refusals.recall(job(), 0.0)
    kept = [one.error for one in refusals._kept.values()]
    assert found is not None
    assert [one.__traceback__ for one in (*kept, found)] == [None, None]


def test_a_flood_lasts_while_it_lasts() -> None:
    """What is recalled counts as well; a second without any is the end."""
    refusals = flooded()
    now_s = 0.0
    for _ in range(int(3 * FLOOD_WINDOW_S / 0.02)):
        now_s += 0.02
        if refusals.recall(job(), now_s) is None:
            refusals.note(job(), FULL, now_s)
    assert refusals.recall(job(), now_s) is not None
    now_s += 3 * FLOOD_WINDOW_S
    refusals.note(job(), FULL, now_s)
    assert refusals.recall(job(), now_s) is None


def test_many_tenants_take_a_bounded_room() -> None:
    """The one that was refused longest ago is forgotten."""
    refusals = flooded()
    for number in range(KEPT_MAX):
        refusals.note(replace(job(), tenant=f"t{number}"), FULL, 0.0)
    assert refusals.recall(job(), 0.0) is None


async def test_a_flood_is_turned_away_without_the_queue() -> None:
    """Each is counted as it would be; one whose id the caller chose may be known, and is put to the queue."""
    async with dispatcher_world() as world:
        world.queue.answer = FULL
        for number in range(4 * FLOOD):
            with pytest.raises(QueueFull, match="full"):
                await world.dispatcher.submit(job(f"j{number}"))
        asked = sum(verb == "enqueue" for verb, _ in world.queue.calls)
        assert FLOOD <= asked < 3 * FLOOD
        assert world.meter.requests == [("m", Outcome.FAILED, None)] * 4 * FLOOD
        with pytest.raises(QueueFull):
            await world.dispatcher.submit(job("mine", digest="d"))
        assert sum(verb == "enqueue" for verb, _ in world.queue.calls) == asked + 1
