"""The worker's service over a real connection: sessions, signs of life, refusals, and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from interlock.v1 import generation_pb2, worker_service_pb2, worker_service_pb2_grpc

from services.common import server
from services.common.channel import connect
from services.common.credential import GATEWAY_ID_KEY, mesh_metadata
from services.common.interceptors import MeshOnly
from services.common.system_clock import SystemClock
from services.worker.core.revision import Phase, Residency
from services.worker.engine import Engine, EngineSettings
from services.worker.servicer import SERVICE, WorkerServicer
from tests.fakes.worker_ports import FakeRunner, continuation

TOKEN = "t" * 32
PROMPT = (3, 1, 4, 1, 5)

# The stream's `read` is typed as object; what comes is a SessionResponse or EOF.
Call = Any


@dataclass
class Service:
    """A worker's service over a fake model, and a stub to it."""

    engine: Engine
    runner: FakeRunner
    residency: Residency
    stub: worker_service_pb2_grpc.WorkerServiceStub

    def open(self) -> Call:
        """A session."""
        metadata = (*mesh_metadata(TOKEN), (GATEWAY_ID_KEY, "gateway-1"))
        return self.stub.Session(metadata=metadata)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """The service with revision r1 active at epoch 5, and two slots."""
    residency = Residency()
    engine = Engine(residency, EngineSettings(slots=2), SystemClock(), pytest.fail)
    made = server.create([SERVICE], SystemClock(), interceptors=[MeshOnly(TOKEN, (f"/{SERVICE}/",))])
    servicer = WorkerServicer("worker-1", "abc", engine, residency, SystemClock())
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, made.grpc_server)
    address = made.bind("127.0.0.1:0")
    await made.grpc_server.start()
    engine.start()
    runner = FakeRunner()
    engine.host("r1", runner)
    residency.begin("m", "r1")
    for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
        residency.enter("r1", phase)
    residency.activate("r1", 5)
    channel = connect(address)
    yield Service(engine, runner, residency, worker_service_pb2_grpc.WorkerServiceStub(channel))
    await channel.close()
    await engine.stop()
    await made.grpc_server.stop(0)


def start(job: str, **fields: Any) -> worker_service_pb2.SessionRequest:
    """A StartJob with the usual prompt."""
    values: dict[str, Any] = {
        "job": job,
        "attempt": 1,
        "model": "m",
        "revision": "r1",
        "epoch": 5,
        "prompt_ids": PROMPT,
        "max_tokens": 4,
        "n": 1,
        "credit_tokens": 1_000,
        "request_id": f"req-{job}",
    }
    return worker_service_pb2.SessionRequest(start=worker_service_pb2.StartJob(**(values | fields)))


def together(*requests: worker_service_pb2.SessionRequest) -> worker_service_pb2.SessionRequest:
    """Several requests in one message."""
    return worker_service_pb2.SessionRequest(commands=worker_service_pb2.Commands(requests=requests))


async def read_outputs(call: Call, job: str) -> list[worker_service_pb2.StepOutput]:
    """Reads until the job's finish; returns its outputs."""
    found: list[worker_service_pb2.StepOutput] = []
    async with asyncio.timeout(10):
        while not found or not found[-1].finish:
            response = await call.read()
            assert response is not grpc.aio.EOF
            found += [one for one in response.step.outputs if one.job == job]
    return found


async def read_finishes(call: Call, jobs: set[str]) -> dict[str, int]:
    """Reads until each of these jobs has ended; nothing is said of others, refusals apart."""
    found: dict[str, int] = {}
    async with asyncio.timeout(10):
        while found.keys() < jobs:
            response = await call.read()
            assert response is not grpc.aio.EOF
            assert {one.job for one in response.step.outputs} <= jobs
            found |= {one.job: one.finish for one in response.step.outputs if one.finish}
    return found


async def read_refusal(call: Call) -> worker_service_pb2.Refused:
    """Reads until a refusal."""
    async with asyncio.timeout(10):
        while True:
            response = await call.read()
            assert response is not grpc.aio.EOF
            if response.HasField("refused"):
                return response.refused  # type: ignore[no-any-return] # see Call


@pytest.mark.parametrize("flaw", ["", "format.regex: lexer error"])
async def test_who_is_to_blame_for_an_error_is_told(service: Service, flaw: str) -> None:
    """In words where it is the job, as of a format; with none where it is the worker."""
    service.runner.poisoned, service.runner.flaw = frozenset({PROMPT[0]}), flaw
    call = service.open()
    await call.write(start("a"))
    (output,) = await read_outputs(call, "a")
    assert (output.finish, output.flaw) == (generation_pb2.FINISH_REASON_ERROR, flaw)
    call.cancel()


async def test_a_job_is_answered_with_contiguous_tokens(service: Service) -> None:
    """A greedy job yields its tokens, indices contiguous from 0, and LENGTH."""
    call = service.open()
    await call.write(start("a", max_tokens=20))
    outputs = await read_outputs(call, "a")
    tokens: list[int] = []
    for output in outputs:
        assert output.index == len(tokens)
        assert output.attempt == 1
        tokens.extend(output.token_ids)
    assert tokens == continuation(PROMPT, 20)
    assert outputs[-1].finish == generation_pb2.FINISH_REASON_LENGTH
    call.cancel()


async def test_tokens_are_told_together_where_the_gateway_asks_for_it(service: Service) -> None:
    """All but the first, and none is missing: the end of an answer that is quicker than a hold tells them."""
    call = service.open()
    coalesce = worker_service_pb2.Coalesce(hold_ms=1_000)
    await call.write(worker_service_pb2.SessionRequest(coalesce=coalesce))
    await call.write(start("a", max_tokens=40))
    outputs = await read_outputs(call, "a")
    assert [token for output in outputs for token in output.token_ids] == continuation(PROMPT, 40)
    assert len(outputs) <= 4
    call.cancel()


async def test_requests_in_one_message_are_taken_as_if_each_had_come_alone(service: Service) -> None:
    """In their order: credit and cancellations find the order in front of them, and not one behind them."""
    cancel = worker_service_pb2.SessionRequest(cancel=worker_service_pb2.CancelJob(job="a"))
    credit = worker_service_pb2.SessionRequest(credit=worker_service_pb2.AddCredit(job="b", tokens=7))
    call = service.open()
    await call.write(
        together(
            cancel,
            start("a", max_tokens=200, credit_tokens=3),
            start("b", max_tokens=9, credit_tokens=2),
            credit,
        )
    )
    outputs = await read_outputs(call, "b")
    assert [token for one in outputs for token in one.token_ids] == continuation(PROMPT, 9)
    await call.write(together(cancel, start("c")))
    found = await read_finishes(call, {"a", "c"})
    assert found == {
        "a": generation_pb2.FINISH_REASON_CANCELLED,
        "c": generation_pb2.FINISH_REASON_LENGTH,
    }
    call.cancel()


async def test_what_is_wrong_in_a_message_of_several_hurts_nothing_else_in_it(service: Service) -> None:
    """Of a bad order it is told; what is unknown, empty or in a message within it is nothing."""
    empty = worker_service_pb2.SessionRequest()
    unknown = worker_service_pb2.SessionRequest(cancel=worker_service_pb2.CancelJob(job="nobody"))
    nested = together(start("nested"), together(start("deeper")))
    call = service.open()
    await call.write(together())
    await call.write(together(start("bad", n=5), empty, unknown, nested, start("good")))
    refused = await read_refusal(call)
    assert (refused.job, refused.reason) == ("bad", worker_service_pb2.REFUSAL_REASON_INVALID)
    assert await read_finishes(call, {"good"}) == {"good": generation_pb2.FINISH_REASON_LENGTH}
    call.cancel()


async def test_more_requests_than_are_taken_together_end_the_session(service: Service) -> None:
    """None of them begins, for any that was left out would be waited for; as many as are told are taken."""
    call = service.open()
    commands_max = (await call.read()).alive.commands_max
    assert commands_max == 64
    starts = [start(f"j{number}", n=5) for number in range(commands_max - 1)]
    await call.write(together(*starts, start("a")))
    assert await read_finishes(call, {"a"}) == {"a": generation_pb2.FINISH_REASON_LENGTH}
    await call.write(together(*starts, start("b"), start("c")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_finishes(call, {"b"})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "commands" in str(caught.value.details())


async def test_a_continuation_starts_behind_what_was_emitted(service: Service) -> None:
    """Emitted ids are not repeated: the first output has the next index."""
    answer = continuation(PROMPT, 9)
    emitted = [worker_service_pb2.EmittedTokens(sequence=0, token_ids=answer[:4])]
    call = service.open()
    await call.write(start("a", max_tokens=9, emitted=emitted, attempt=2))
    outputs = await read_outputs(call, "a")
    assert outputs[0].index == 4
    assert [token for output in outputs for token in output.token_ids] == answer[4:]
    call.cancel()


async def test_a_prompt_that_was_seen_is_told_as_cached(service: Service) -> None:
    """The first output of a second turn tells how many prompt tokens were found; later ones tell none."""
    prompt = range(40)
    call = service.open()
    await call.write(start("a", prompt_ids=prompt))
    assert (await read_outputs(call, "a"))[0].cached_prompt_tokens == 0
    await call.write(start("b", prompt_ids=[*prompt, *continuation(prompt, 4), 7]))
    outputs = await read_outputs(call, "b")
    assert outputs[0].index == 0
    assert [one.cached_prompt_tokens for one in outputs] == [43] + [0] * (len(outputs) - 1)
    call.cancel()


async def test_signs_of_life_come_without_work(service: Service) -> None:
    """Two Alive messages arrive on an idle session, with the free slots."""
    call = service.open()
    async with asyncio.timeout(10):
        for _ in range(2):
            response = await call.read()
            assert response.alive.free_slots == 2
    call.cancel()


@pytest.mark.parametrize(
    ("fields", "reason", "named"),
    [
        ({"revision": "r2"}, "REVISION_NOT_READY", ""),
        ({"model": "other"}, "REVISION_NOT_READY", ""),
        ({"epoch": 4}, "EPOCH_STALE", ""),
        ({"n": 5}, "INVALID", "n"),
        ({"logprobs": 21}, "INVALID", "logprobs"),
        ({"format": generation_pb2.OutputFormat()}, "INVALID", "format"),
        ({"format": generation_pb2.OutputFormat(regex="a+")}, "INVALID", "format"),
        ({"format": generation_pb2.OutputFormat(regex="a" * 4097)}, "INVALID", "format.regex"),
        ({"prompt_ids": ()}, "INVALID", "prompt"),
        ({"prompt_ids": (5_000,)}, "INVALID", "vocabulary"),
        ({"max_tokens": 10_000}, "INVALID", "max_tokens"),
        ({"sampling": generation_pb2.SamplingParams(logit_bias={1_000: 1.0})}, "INVALID", "logit_bias"),
        ({"sampling": generation_pb2.SamplingParams(presence_penalty=3)}, "INVALID", "presence_penalty"),
        (
            {"sampling": generation_pb2.SamplingParams(repetition_penalty=0)},
            "INVALID",
            "repetition_penalty",
        ),
        (
            {"sampling": generation_pb2.SamplingParams(repetition_penalty=1e-38)},
            "INVALID",
            "repetition_penalty",
        ),
        (
            {"sampling": generation_pb2.SamplingParams(temperature=float("nan"), seed=1)},
            "INVALID",
            "temperature",
        ),
        ({"sampling": generation_pb2.SamplingParams(temperature=1)}, "INVALID", "seed"),
        ({"sampling": generation_pb2.SamplingParams(top_p=0)}, "INVALID", "top_p"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    service: Service, fields: dict[str, Any], reason: str, named: str
) -> None:
    """Each flaw has its reason, INVALID names the field, and the session goes on."""
    call = service.open()
    await call.write(start("a", **fields))
    refused = await read_refusal(call)
    assert refused.reason == worker_service_pb2.RefusalReason.Value(f"REFUSAL_REASON_{reason}")
    assert named in refused.message
    assert refused.epoch == 5
    await call.write(start("b"))
    assert (await read_outputs(call, "b"))[-1].finish == generation_pb2.FINISH_REASON_LENGTH
    call.cancel()


async def test_the_end_of_a_session_cancels_its_jobs(service: Service) -> None:
    """A gateway that vanishes leaves no sequence behind: its slots are free for others."""
    leaving = service.open()
    for name in ("a", "b"):
        await leaving.write(start(name, max_tokens=200, credit_tokens=2))
        async with asyncio.timeout(10):
            while not any(one.job == name for one in (await leaving.read()).step.outputs):
                pass
    leaving.cancel()
    staying = service.open()
    async with asyncio.timeout(10):
        while (await staying.read()).alive.free_slots < 2:
            pass
    await staying.write(start("c"))
    await read_outputs(staying, "c")
    staying.cancel()


async def test_credit_and_cancel_reach_the_job(service: Service) -> None:
    """A paused job goes on with credit, and a cancelled one ends with CANCELLED."""
    call = service.open()
    await call.write(start("a", max_tokens=200, credit_tokens=3))
    read = 0
    async with asyncio.timeout(10):
        while read < 3:
            read += sum(len(one.token_ids) for one in (await call.read()).step.outputs)
        credit = worker_service_pb2.AddCredit(job="a", tokens=2)
        await call.write(worker_service_pb2.SessionRequest(credit=credit))
        while read < 5:
            read += sum(len(one.token_ids) for one in (await call.read()).step.outputs)
    cancel = worker_service_pb2.CancelJob(job="a")
    await call.write(worker_service_pb2.SessionRequest(cancel=cancel))
    outputs = await read_outputs(call, "a")
    assert outputs[-1].finish == generation_pb2.FINISH_REASON_CANCELLED
    assert outputs[-1].index == 5
    call.cancel()


async def test_strangers_are_turned_away(service: Service) -> None:
    """Without the mesh credential neither method answers."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.GetState(worker_service_pb2.GetStateRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_state_tells_revisions_and_load(service: Service) -> None:
    """GetState shows the active revision and the worker's name."""
    state = await service.stub.GetState(worker_service_pb2.GetStateRequest(), metadata=mesh_metadata(TOKEN))
    assert (state.worker_id, state.incarnation, state.epoch) == ("worker-1", "abc", 5)
    assert [one.revision for one in state.revisions] == ["r1"]
    assert state.load.memory_bytes > 0
