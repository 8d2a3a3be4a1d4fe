"""Long prompts have turns, which go round the tenants, and a deadline holds from a request's arrival."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from services.common.conversation import Aside, Message
from services.common.errors import DeadlineExceeded, InterlockError, QueueFull
from services.common.system_clock import SystemClock
from services.common.tokens import TokenVerifier
from services.gateway.core.catalog import Catalog, CatalogEntry
from services.gateway.core.jobs import Grant, Outcome, Principal, QueuedJob, Waiting
from services.gateway.core.params import GenerationRequest, Prompt, RawPrompt, TextPrompt, TokenPrompt
from services.gateway.dispatcher.reception import DeadlineLimits, Reception
from services.gateway.dispatcher.room import Room
from services.gateway.dispatcher.tokenizing import AT_ONCE, OF_TENANT, WAITING_BYTES_MAX, Tokenizing
from tests.fakes.gateway_ports import FakeTokenizer
from tests.fixtures import waiting
from tests.fixtures.dispatcher_world import World, dispatcher_world

ALICE, BOB = Principal("alice"), Principal("bob")
# Longer than anything here takes.
LONG_S = 30.0
until = partial(waiting.until, within_s=LONG_S)


class Gate:
    """Work that a test lets end, one at a time or all at once."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(0)
        self.begun: list[str] = []
        self.ended: list[str] = []

    def work(self, name: str) -> Callable[[], tuple[int, ...]]:
        """Work of a name, which fails if it is named so."""

        def wait() -> tuple[int, ...]:
            self.begun.append(name)
            self._places.acquire()
            self.ended.append(name)
            if name == "fails":
                raise ValueError(name)
            return (1, 2)

        return wait

    def open(self, count: int) -> None:
        """Lets so many end."""
        self._places.release(count)


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    """A gate that is open in the end, so that no thread is left."""
    gate = Gate()
    yield gate
    gate.open(1_000)


def readers(tokenizing: Tokenizing, gate: Gate, tenant: str, count: int) -> list[asyncio.Task[Any]]:
    """So many prompts of a tenant."""
    return [
        asyncio.create_task(tokenizing.read(tenant, 1, LONG_S, gate.work(f"{tenant}{number}")))
        for number in range(count)
    ]


async def every_turn(tokenizing: Tokenizing, gate: Gate) -> list[asyncio.Task[Any]]:
    """Takes all turns, for two tenants."""
    reading = [*readers(tokenizing, gate, "crowd", OF_TENANT), *readers(tokenizing, gate, "carol", 1)]
    await until(lambda: len(gate.begun) == AT_ONCE)
    return reading


async def test_a_crowd_waits_behind_itself_and_others_pass_it(gate: Gate) -> None:
    """One more goes on at once, and the next of others when any turn has ended."""
    tokenizing = Tokenizing(Room(100))
    crowd = readers(tokenizing, gate, "crowd", OF_TENANT + 12)
    await until(lambda: tokenizing.waiting == 12)
    first = readers(tokenizing, gate, "alice", 1)
    await until(lambda: "alice0" in gate.begun)
    late = readers(tokenizing, gate, "bob", 1)
    await until(lambda: tokenizing.waiting == 13)
    gate.open(1)
    await until(lambda: len(gate.begun) == AT_ONCE + 1)
    assert gate.begun[-1] == "bob0"
    gate.open(100)
    results = await asyncio.gather(*crowd, *first, *late)
    assert results == [(1, 2)] * len(results)
    assert [name for name in gate.begun if "crowd" in name] == [f"crowd{number}" for number in range(15)]


@pytest.mark.parametrize("ends", ["deadline", "cancelled"])
async def test_who_gives_up_hears_at_once_and_the_turn_ends_with_the_thread(gate: Gate, ends: str) -> None:
    """More threads than there are turns would starve the loop; what one says that is left behind is lost."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    tokenizing = Tokenizing(Room(100))
    left_s = 0.05 if ends == "deadline" else LONG_S
    reading = [
        asyncio.create_task(tokenizing.read(f"t{number}", 1, left_s, gate.work("fails")))
        for number in range(AT_ONCE)
    ]
    await until(lambda: len(gate.begun) == AT_ONCE)
    if ends == "cancelled":
        for task in reading:
            task.cancel()
    results = await asyncio.gather(*reading, return_exceptions=True)
    expected = DeadlineExceeded if ends == "deadline" else asyncio.CancelledError
    assert [type(result) for result in results] == [expected] * AT_ONCE
    assert gate.ended == []
    following = asyncio.create_task(tokenizing.read("bob", 1, LONG_S, gate.work("bob")))
    await until(lambda: tokenizing.waiting == 1)
    assert len(gate.begun) == AT_ONCE
    gate.open(100)
    assert await following == (1, 2)
    del reading, results
    assert told == []


async def test_a_deadline_passes_in_the_line_too(gate: Gate) -> None:
    """Who has gone is in nobody's way, also where their turn comes at that moment."""
    tokenizing = Tokenizing(Room(100))
    running = await every_turn(tokenizing, gate)
    with pytest.raises(DeadlineExceeded):
        await tokenizing.read("bob", 1, 0.02, gate.work("late"))
    assert tokenizing.waiting == 0
    leaving, staying = (
        asyncio.create_task(tokenizing.read("bob", 1, LONG_S, gate.work("bob"))) for _ in range(2)
    )
    await until(lambda: tokenizing.waiting == 2)
    leaving.cancel()
    # Its future is cancelled, and its task has not heard of it yet.
    tokenizing._give_back("crowd")
    await until(lambda: "bob" in gate.begun)
    assert leaving.cancelled()
    assert gate.begun.count("bob") == 1
    gate.open(100)
    assert await staying == (1, 2)
    await asyncio.gather(*running)


async def test_a_turn_that_comes_too_late_goes_on(gate: Gate) -> None:
    """Its task was cancelled between being given the turn and running again."""
    tokenizing = Tokenizing(Room(100))
    running = await every_turn(tokenizing, gate)
    leaving, staying = (
        asyncio.create_task(tokenizing.read(name, 1, LONG_S, gate.work(name))) for name in "bc"
    )
    await until(lambda: tokenizing.waiting == 2)
    tokenizing._give_back("crowd")
    leaving.cancel()
    await until(lambda: "c" in gate.begun)
    assert leaving.cancelled()
    assert "b" not in gate.begun
    gate.open(100)
    assert await staying == (1, 2)
    await asyncio.gather(*running)


async def test_an_error_comes_back_and_the_turn_too(gate: Gate) -> None:
    """As often as it happens."""
    tokenizing = Tokenizing(Room(100))
    gate.open(1_000)
    for _ in range(3 * AT_ONCE):
        with pytest.raises(ValueError, match="fails"):
            await tokenizing.read("alice", 1, LONG_S, gate.work("fails"))


async def test_as_many_wait_as_the_gateway_may_carry_and_half_of_one_tenant(gate: Gate) -> None:
    """What runs counts; the refusal says when to try again."""
    carried = 0
    tokenizing = Tokenizing(Room(10, lambda: carried))
    running = await every_turn(tokenizing, gate)
    crowd = readers(tokenizing, gate, "crowd", 5)
    await until(lambda: tokenizing.waiting == 5)
    with pytest.raises(QueueFull, match="of this subject") as caught:
        await tokenizing.read("crowd", 1, LONG_S, gate.work("crowd"))
    assert caught.value.retry_after_s
    carried = 4
    (last,) = readers(tokenizing, gate, "alice", 1)
    await until(lambda: tokenizing.waiting == 6)
    with pytest.raises(QueueFull, match="carries 10 requests") as caught:
        await tokenizing.read("bob", 1, LONG_S, gate.work("bob"))
    assert caught.value.retry_after_s
    gate.open(100)
    await asyncio.gather(*running, *crowd, last)


async def test_prompts_that_wait_take_so_much_memory_and_half_of_it_of_one_tenant(gate: Gate) -> None:
    """They are counted while they wait; there is room again when they had their turn, or left."""
    tokenizing = Tokenizing(Room(100))
    running = await every_turn(tokenizing, gate)
    half = WAITING_BYTES_MAX // 2

    def begin(tenant: str, size_bytes: int) -> asyncio.Task[Any]:
        return asyncio.create_task(tokenizing.read(tenant, size_bytes, LONG_S, gate.work(tenant)))

    crowd = begin("crowd", half)
    await until(lambda: tokenizing.waiting == 1)
    with pytest.raises(QueueFull, match="long prompts"):
        await begin("crowd", 1)
    bob = begin("bob", half)
    await until(lambda: tokenizing.waiting == 2)
    with pytest.raises(QueueFull, match="long prompts") as caught:
        await begin("alice", 1)
    assert caught.value.retry_after_s
    bob.cancel()
    await asyncio.gather(bob, return_exceptions=True)
    alice = begin("alice", half)
    await until(lambda: tokenizing.waiting == 2)
    gate.open(100)
    await asyncio.gather(*running, crowd, alice)


async def test_who_comes_too_late_takes_no_turn(gate: Gate) -> None:
    """No thread begins what nobody waits for."""
    tokenizing = Tokenizing(Room(100))
    with pytest.raises(DeadlineExceeded):
        await tokenizing.read("bob", 1, 0.0, gate.work("late"))
    gate.open(1)
    assert await tokenizing.read("bob", 1, LONG_S, gate.work("bob")) == (1, 2)
    assert gate.begun == ["bob"]


@dataclass(frozen=True)
class SlowTokenizer(FakeTokenizer):
    """Takes long over all that is longer than a few characters.

    Attributes:
        gate: What lets it end.
    """

    gate: Gate = field(default_factory=Gate)

    async def encode(self, messages: Sequence[Message], aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        text = messages[0].content
        return await self.encode_raw(text, aside)

    async def encode_raw(self, text: str, aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode_raw`."""
        return (1,) if len(text) < 9 else await aside(self.gate.work(text))


def reception_of(world: World, gate: Gate) -> Reception:
    """A reception in front of the world's dispatcher."""
    catalog = Catalog()
    catalog.activate(CatalogEntry("m", "r1", 1, 1_000, 1, SlowTokenizer(gate=gate)))
    verifier = TokenVerifier("a-secret-of-at-least-thirty-two-bytes")
    return Reception(verifier, catalog, world.dispatcher, DeadlineLimits(), SystemClock(), meter=world.meter)


async def asked(reception: Reception, prompt: Prompt, timeout_s: float) -> None:
    """Asks, and leaves."""
    name = reception.request_id(None)
    stream = await reception.generate(ALICE, name, GenerationRequest(prompt=prompt), timeout_s)
    await stream.aclose()


@pytest.mark.parametrize("prompt", [TextPrompt("a long text"), RawPrompt("a long text")])
async def test_a_deadline_holds_while_a_prompt_is_tokenized(gate: Gate, prompt: Prompt) -> None:
    """The request ends there, counted as expired, and no queue hears of it; counting is no other."""
    async with dispatcher_world() as world:
        reception = reception_of(world, gate)
        with pytest.raises(DeadlineExceeded):
            await asked(reception, prompt, 0.05)
        assert world.meter.requests == [("m", Outcome.EXPIRED, None)]
        with pytest.raises(DeadlineExceeded):
            await reception.count(BOB, "m", prompt, 0.05)
        assert world.queue.calls == []


async def test_what_is_left_of_the_time_goes_on_with_the_job(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry in the queue has it, and so has its timer."""
    async with dispatcher_world() as world:
        jobs: list[QueuedJob] = []
        enqueue = world.queue.enqueue

        async def noted(job: QueuedJob) -> Grant | Waiting:
            jobs.append(job)
            return await enqueue(job)

        monkeypatch.setattr(world.queue, "enqueue", noted)
        reception = reception_of(world, gate)
        asking = asyncio.create_task(asked(reception, TextPrompt("a long text"), LONG_S))
        await until(lambda: len(gate.begun) == 1)
        await asyncio.sleep(0.3)
        gate.open(1)
        await asking
        (queued,) = jobs
        assert LONG_S / 2 < queued.timeout_s <= LONG_S - 0.3


async def test_short_prompts_wait_for_nobody(gate: Gate) -> None:
    """Nor do ids, while every turn is taken."""
    async with dispatcher_world() as world:
        reception, long = reception_of(world, gate), TextPrompt("a long text")
        running = [
            asyncio.create_task(reception.count(Principal(f"t{number}"), "m", long, LONG_S))
            for number in range(AT_ONCE)
        ]
        await until(lambda: len(gate.begun) == AT_ONCE)
        for prompt in (TextPrompt("short"), RawPrompt("short"), TokenPrompt((1, 2))):
            async with asyncio.timeout(LONG_S):
                await asked(reception, prompt, LONG_S)
        assert gate.ended == []
        gate.open(AT_ONCE)
        assert [count.prompt_tokens for count in await asyncio.gather(*running)] == [2] * AT_ONCE


async def test_prompts_that_wait_have_places_that_short_ones_do_not_get(gate: Gate) -> None:
    """A process carries so many requests and no more, whichever of them came first."""
    async with dispatcher_world() as world:
        reception, long = reception_of(world, gate), TextPrompt("a long text")
        reading = [
            asyncio.create_task(reception.count(Principal(f"t{number}"), "m", long, LONG_S))
            for number in range(AT_ONCE + 2)
        ]
        await until(lambda: reception.prompts_waiting == 2)
        with pytest.raises(QueueFull, match="carries 2 requests"):
            await asked(reception, TextPrompt("short"), LONG_S)
        gate.open(AT_ONCE + 2)
        await asyncio.gather(*reading)
        await asked(reception, TextPrompt("short"), LONG_S)


async def test_a_time_that_is_over_is_told_before_the_queue_is_asked(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a machine stood still."""
    async with dispatcher_world() as world:
        reception = reception_of(world, gate)
        moments = iter((0.0, *[100.0] * 10))
        monkeypatch.setattr(reception._clock, "monotonic", lambda: next(moments))
        with pytest.raises(InterlockError) as caught:
            await asked(reception, TextPrompt("short"), LONG_S)
        assert caught.value.reason == "DEADLINE_EXCEEDED"
        assert world.queue.calls == []
