"""A model that stands in for another one whose workers are all barred: in both APIs, by any kind of id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb

from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import (
    MODEL,
    GatewayWorld,
    bearer,
    fail,
    joined,
    make_token,
    open_gateway,
    read_rest,
    reason_of,
)

OTHER = "small"
OWN, STOOD_IN = "by the large one", "by the small one"


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway of two models with a worker each, those of the first one barred."""
    async with open_gateway(stand_in=OTHER) as world:
        await world.add_worker("w1", Script(answer=OWN))
        await world.add_worker("s1", Script(answer=STOOD_IN), model=OTHER)
        await world.hold_open("w1")
        yield world


def model_of(events: list[pb.GenerateResponse]) -> str:
    """The model that a stream says that it is of."""
    return next(event.started.model for event in events if event.HasField("started"))


async def test_a_request_whose_workers_are_all_barred_is_answered_by_the_other_model(
    gateway: GatewayWorld,
) -> None:
    """The answer says which one it is by, in both APIs; once a breaker closes, it is the model itself."""
    events = await gateway.generate(pb.GenerateRequest(text="hi", max_tokens=50))
    assert (model_of(events), joined(events)) == (OTHER, STOOD_IN)
    body = (await gateway.post({"text": "hi", "model": MODEL})).json
    assert (body["model"], body["result"]) == (OTHER, STOOD_IN)
    assert not gateway.workers["w1"].starts
    await gateway.hold_open()
    events = await gateway.generate(pb.GenerateRequest(text="hi", max_tokens=50))
    assert (model_of(events), joined(events)) == (MODEL, OWN)


async def test_models_are_listed_with_the_own_one_as_the_default(gateway: GatewayWorld) -> None:
    """Though the other one was there first; it may be asked by its name, too."""
    metadata = bearer(make_token("alice", "models:read"))
    listed = await gateway.stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
    assert {model.name: model.is_default for model in listed.models} == {MODEL: True, OTHER: False}
    events = await gateway.generate(pb.GenerateRequest(model=OTHER, text="hi", max_tokens=50))
    assert (model_of(events), joined(events)) == (OTHER, STOOD_IN)


@pytest.mark.parametrize("kind", ["barred too", "no room", "token ids", "gone"])
async def test_where_the_other_model_cannot_answer_the_first_refusal_is_told(
    gateway: GatewayWorld, kind: str
) -> None:
    """What stands in for it is not asked in turn; ids of one vocabulary mean nothing in another."""
    request = pb.GenerateRequest(text="hi", max_tokens=50)
    if kind == "barred too":
        await gateway.queue.list_open(OTHER, "s1", None)
    elif kind == "no room":
        request.max_tokens = 200
    elif kind == "token ids":
        request.tokens.ids[:] = [104, 105]
    else:
        gateway.queue.set_route(OTHER, 2, {})
        gateway.queue.remove_worker(OTHER, "s1")
        request = pb.GenerateRequest(text="hi" * 200)
    error, events = await fail(gateway.call(request))
    assert (error.code(), reason_of(error), events) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", [])
    assert not gateway.workers["s1"].starts
    await gateway.wait_idle()


@pytest.mark.parametrize("resumable", [False, True])
async def test_a_request_with_a_name_is_answered_once(gateway: GatewayWorld, *, resumable: bool) -> None:
    """Who repeats it asks for the first model: it joins what runs, or is told that the id is in use."""
    script = gateway.workers["s1"].script
    script.interval_s = 0.05
    request = pb.GenerateRequest(text="hi", max_tokens=50, request_id="mine", resumable=resumable)
    first = gateway.call(request)
    while not (event := await first.read()).HasField("started"):
        pass
    assert event.started.model == OTHER
    await gateway.hold_open()
    if resumable:
        second = await gateway.generate(request)
        assert (model_of(second), joined(second)) == (OTHER, STOOD_IN)
        resumed = gateway.stub.ResumeGeneration(
            pb.ResumeGenerationRequest(request_id="mine"), metadata=bearer()
        )
        assert joined([event async for event in resumed]) == STOOD_IN
    else:
        error, _ = await fail(gateway.call(request))
        assert reason_of(error) == "REQUEST_EXISTS"
    script.interval_s = 0.0
    await read_rest(first)
    await gateway.wait_idle()
    assert len(gateway.workers["s1"].starts) == 1
    assert not gateway.workers["w1"].starts


@pytest.mark.parametrize("resumable", [False, True])
async def test_an_id_that_nobody_answered_is_free_again(gateway: GatewayWorld, *, resumable: bool) -> None:
    """Neither model took it: its client may ask anything by it."""
    await gateway.queue.list_open(OTHER, "s1", None)
    for text in ("one", "another"):
        request = pb.GenerateRequest(text=text, max_tokens=50, request_id="mine", resumable=resumable)
        error, _ = await fail(gateway.call(request))
        assert reason_of(error) == "NO_WORKER"
        await gateway.wait_idle()
        await asyncio.sleep(0)
    await gateway.hold_open()
    request = pb.GenerateRequest(text="third", max_tokens=50, request_id="mine", resumable=resumable)
    assert joined(await gateway.generate(request)) == OWN
