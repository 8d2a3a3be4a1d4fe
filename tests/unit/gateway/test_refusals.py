"""In a flood, what a crowded queue refused just now is not put to it again; nothing else is kept from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import ArgumentInvalid, ContextExceeded, InterlockError, QueueFull
from services.common.system_clock import SystemClock
from services.common.tokens import TokenVerifier
from services.gateway.core.catalog import Catalog, CatalogEntry
from services.gateway.core.jobs import Band, Outcome, Principal
from services.gateway.core.params import GenerationRequest, TextPrompt, TokenPrompt
from services.gateway.core.queue_errors import gateway_full, hopeless
from services.gateway.core.refusals import (
    ALIKE_S,
    FLOOD,
    FLOOD_WINDOW_S,
    KEPT_MAX,
    STANDS_S,
    TEMPLATE_TOKENS,
    Outline,
    Refusals,
)
from services.gateway.core.tenancy import TenantLimits
from services.gateway.dispatcher.reception import DeadlineLimits, Reception
from tests.fakes.gateway_ports import FakeTokenizer
from tests.fixtures.dispatcher_world import World, dispatcher_world

FULL = QueueFull("full", retry_after_s=3.0)
ALICE = Principal("alice", frozenset({"generate"}), TenantLimits())


def outline(**fields: Any) -> Outline:
    """A request with plain values."""
    given = {
        "model": "m",
        "tenant": "alice",
        "band": Band.INTERACTIVE,
        "slots": 1,
        "limits": TenantLimits(),
        "timeout_s": 30.0,
        "deadline_s": 30.0,
        "max_tokens": 100,
        "prompt_size": 40,
        **fields,
    }
    return Outline(**given)


def flooded(count: int = FLOOD, asked: Outline | None = None) -> Refusals:
    """So many refusals at the same moment, 0."""
    refusals = Refusals()
    for _ in range(count):
        refusals.note(asked or outline(), FULL, 0.0)
    return refusals


def test_below_a_flood_every_request_is_put_to_the_queue() -> None:
    """One refusal less is none."""
    assert flooded(FLOOD - 1).recall(outline(), 0.0) is None
    assert flooded().recall(outline(), 0.0) is not None


def test_a_refusal_stands_for_a_moment() -> None:
    """It is told as it was, to each caller as an error of its own."""
    refusals = flooded()
    first, second = (refusals.recall(outline(), STANDS_S / 2) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.message, first.retry_after_s) == (FULL.message, FULL.retry_after_s)
    assert len({id(error) for error in (first, second, FULL)}) == 3
    assert refusals.recall(outline(), STANDS_S) is None


LIMITS = TenantLimits(tokens_per_minute=1_000)


@pytest.mark.parametrize(
    "other",
    [
        {"timeout_s": 30.0 + 2 * ALIKE_S},
        {"timeout_s": 1.0},
        {"max_tokens": 99},
        {"prompt_size": 29},
        {"in_tokens": True},
        {"slots": 2},
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
        "another measure",
        "slots",
        "limits",
        "tenant",
        "band",
        "model",
    ],
)
def test_nobody_is_refused_for_another_one(other: dict[str, Any]) -> None:
    """Their prospects may be better, their words would be others: the queue knows."""
    assert flooded().recall(outline(**other), 0.0) is None


def test_whoever_is_alike_and_takes_no_less_is_refused() -> None:
    """More to do; and a deadline that differs by the way here, which of a short one is a part of it."""
    refusals = flooded()
    assert refusals.recall(outline(timeout_s=30.0 - ALIKE_S / 2), 0.0) is not None
    assert refusals.recall(outline(timeout_s=30.0 + ALIKE_S / 2, prompt_size=50), 0.0) is not None
    brief = flooded(asked=outline(timeout_s=0.1))
    assert brief.recall(outline(timeout_s=0.105), 0.0) is not None
    assert brief.recall(outline(timeout_s=0.12), 0.0) is None


def test_a_text_that_is_a_little_shorter_is_alike_and_fewer_token_ids_are_not() -> None:
    """Nobody has counted the tokens of a text; ids are counted."""
    assert flooded().recall(outline(prompt_size=30), 0.0) is not None
    in_tokens = flooded(asked=outline(in_tokens=True))
    assert in_tokens.recall(outline(in_tokens=True), 0.0) is not None
    assert in_tokens.recall(outline(in_tokens=True, prompt_size=39), 0.0) is None


def test_what_no_minute_could_hold_is_put_to_the_queue() -> None:
    """It has an answer of its own, which says that no waiting helps."""
    refusals = flooded(asked=outline(limits=LIMITS))
    assert refusals.recall(outline(limits=LIMITS), 0.0) is not None
    # The rest may be the template's.
    assert refusals.recall(outline(limits=LIMITS, prompt_size=901 - TEMPLATE_TOKENS), 0.0) is None
    several = flooded(asked=outline(limits=LIMITS, slots=10))
    assert several.recall(outline(limits=LIMITS, slots=10), 0.0) is None


@pytest.mark.parametrize("error", [hopeless(0, 0.2, 0.1), gateway_full(9)], ids=["a slot", "a place"])
def test_what_was_missing_for_a_moment_says_nothing_of_the_next_request(error: QueueFull) -> None:
    """Nobody was ahead in the queue, or this gateway was full: either may have changed."""
    refusals = Refusals()
    for _ in range(2 * FLOOD):
        refusals.note(outline(), error, 0.0)
    assert refusals.recall(outline(), 0.0) is None


def fail() -> None:
    """As the queue does."""
    raise QueueFull("full")


def test_what_is_kept_holds_nothing_of_the_request() -> None:
    """A raised error holds the frames that it came through, and with them the prompt."""
    refusals = Refusals()
    for _ in range(FLOOD):
        with pytest.raises(QueueFull) as caught:
            fail()
        refusals.note(outline(), caught.value, 0.0)
    found = refusals.recall(outline(), 0.0)
    kept = [one.error for one in refusals._kept.values()]
    assert found is not None
    assert [one.__traceback__ for one in (*kept, found)] == [None, None]


def test_a_flood_lasts_while_it_lasts() -> None:
    """What is recalled counts as well; a second without any is the end."""
    refusals = flooded()
    now_s = 0.0
    for _ in range(int(3 * FLOOD_WINDOW_S / 0.02)):
        now_s += 0.02
        if refusals.recall(outline(), now_s) is None:
            refusals.note(outline(), FULL, now_s)
    assert refusals.recall(outline(), now_s) is not None
    now_s += 3 * FLOOD_WINDOW_S
    refusals.note(outline(), FULL, now_s)
    assert refusals.recall(outline(), now_s) is None


def test_many_tenants_take_a_bounded_room() -> None:
    """The one that was refused longest ago is forgotten."""
    refusals = flooded()
    for number in range(KEPT_MAX):
        refusals.note(replace(outline(), tenant=f"t{number}"), FULL, 0.0)
    assert refusals.recall(outline(), 0.0) is None


class CountingTokenizer(FakeTokenizer):
    """Counts what it was given."""

    def __init__(self) -> None:
        self.texts = 0

    async def encode(self, messages: Any, aside: Any) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        self.texts += 1
        return await super().encode(messages, aside)


def reception_of(world: World, tokenizer: FakeTokenizer) -> Reception:
    """A reception in front of the world's dispatcher."""
    catalog = Catalog()
    catalog.activate(CatalogEntry("m", "r1", 1, 1_000, 1, tokenizer))
    deadlines = DeadlineLimits(30.0)
    verifier = TokenVerifier("a-secret-of-at-least-thirty-two-bytes")
    return Reception(verifier, catalog, world.dispatcher, deadlines, SystemClock(), meter=world.meter)


async def refused(reception: Reception, request: GenerationRequest) -> InterlockError:
    """Asks, and is refused."""
    name = reception.request_id(request.request_id)
    with pytest.raises(InterlockError) as caught:
        await reception.generate(ALICE, name, request, 30.0)
    return caught.value


async def test_a_flood_is_turned_away_without_tokenizer_and_queue() -> None:
    """Each is counted as it would be; one whose id the caller chose may be known, and is put to the queue."""
    tokenizer, asked = CountingTokenizer(), GenerationRequest(prompt=TextPrompt("a question"))
    async with dispatcher_world() as world:
        reception = reception_of(world, tokenizer)
        world.queue.answer = FULL
        for _ in range(4 * FLOOD):
            told = await refused(reception, asked)
            assert (told.reason, told.message, told.retry_after_s) == ("QUEUE_FULL", "full", 3.0)
        put = sum(verb == "enqueue" for verb, _ in world.queue.calls)
        assert FLOOD <= put < 3 * FLOOD
        assert tokenizer.texts == put
        assert world.meter.requests == [("m", Outcome.FAILED, None)] * 4 * FLOOD
        await refused(reception, replace(asked, request_id="mine"))
        assert sum(verb == "enqueue" for verb, _ in world.queue.calls) == put + 1


async def test_what_makes_no_sense_is_told_so_in_a_flood() -> None:
    """Nothing that a look at the request shows is taken for a crowd; what a tokenizer says waits for one."""
    async with dispatcher_world() as world:
        reception = reception_of(world, FakeTokenizer())
        world.queue.answer = FULL
        asked = GenerationRequest(prompt=TokenPrompt((1, 2, 3)))
        for _ in range(4 * FLOOD):
            await refused(reception, asked)
        assert isinstance(await refused(reception, replace(asked, max_tokens=0)), ArgumentInvalid)
        assert isinstance(await refused(reception, replace(asked, n=0)), ArgumentInvalid)
        too_long = replace(asked, prompt=TokenPrompt((1,) * 2_000))
        assert isinstance(await refused(reception, too_long), ContextExceeded)
