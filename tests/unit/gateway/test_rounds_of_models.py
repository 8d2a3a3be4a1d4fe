"""A gateway's rounds where another mesh helps out: what fails there is nothing to this mesh's own model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import StoreUnavailable
from tests.fixtures.dispatcher_world import World, dispatcher_world, job

OWN, HELPER = "m", "helper"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A dispatcher whose own model is looked after behind the helper's."""
    async with dispatcher_world(helpers=(HELPER,)) as made:
        yield made


def fail_for(
    monkeypatch: pytest.MonkeyPatch, world: World, verb: str, error: Exception, model: str
) -> list[str]:
    """Lets the queue fail for a model alone; returns which models it did not fail for, as they are asked."""
    asked: list[str] = []
    call: Callable[..., Awaitable[Any]] = getattr(world.queue, verb)

    async def ask(named: str, *args: Any, **fields: Any) -> Any:
        if named == model:
            raise error
        asked.append(named)
        return await call(named, *args, **fields)

    monkeypatch.setattr(world.queue, verb, ask)
    return asked


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), ValueError("a defect")])
async def test_what_fails_with_the_helper_does_not_keep_the_own_model_from_its_rounds(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As while Redis is away, and nothing is known of the helper's workers: the own model is served."""
    asked = fail_for(monkeypatch, world, "renew", error, HELPER)
    await world.dispatcher.renew()
    assert asked == [OWN]
    assert world.dispatcher.store_reachable


async def test_readiness_is_lost_with_the_own_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the helper's queue answers."""
    await world.dispatcher.renew()
    asked = fail_for(monkeypatch, world, "renew", StoreUnavailable("gone"), OWN)
    await world.dispatcher.renew()
    assert asked == [HELPER]
    assert not world.dispatcher.store_reachable


@pytest.mark.parametrize(("model", "ready"), [(OWN, False), (HELPER, True)])
async def test_a_request_that_is_not_taken_says_something_of_its_own_mesh_alone(
    world: World, model: str, *, ready: bool
) -> None:
    """Where the helper cannot take it the own model may well be served."""
    await world.dispatcher.renew()
    world.queue.answer = StoreUnavailable("gone")
    with pytest.raises(StoreUnavailable):
        await world.dispatcher.submit(replace(job(), model=model))
    assert world.dispatcher.store_reachable is ready


async def test_the_own_model_is_reaped_where_the_helper_cannot_be(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does that say anything of readiness."""
    await world.dispatcher.renew()
    asked = fail_for(monkeypatch, world, "reap", StoreUnavailable("gone"), HELPER)
    rounds = world.dispatcher._rounds
    monkeypatch.setattr(rounds, "_renew_s", 0.001)
    task = asyncio.create_task(rounds._reap_forever())
    await world.queue.wait_for("reap", OWN)
    task.cancel()
    assert set(asked) == {OWN}
    assert world.dispatcher.store_reachable
