"""What a tenant is told of its own consumption, through the whole gateway."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb

from services.common.token_mint import mint
from services.gateway.core.tenancy import LIMIT_MAX, TenantBounds, TenantLimits
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_edge import envoy_before, request_bytes
from tests.fixtures.gateway_world import SECRET, GatewayWorld, bearer, make_token, open_gateway

REQUEST = pb.GenerateRequest(text="hi", max_tokens=100)
PROMPT_TOKENS = len("user:hi\n")
# Tokens of one message of the worker.
BATCH = 4
# What is charged is read in the minute that it belongs to.
MINUTE_S = 60.0
ENOUGH_S = 5.0


async def early_in_a_minute() -> None:
    """Returns where the minute has time enough for a request and a look at its charge."""
    left_s = MINUTE_S - time.time() % MINUTE_S
    if left_s < ENOUGH_S:
        await asyncio.sleep(left_s + 0.1)


async def test_usage_is_reserved_while_a_request_runs_and_charged_when_it_ends() -> None:
    """The estimate is prompt and max_tokens; the charge is what was produced; the minute is this one."""
    await early_in_a_minute()
    async with open_gateway() as gateway:
        worker = await gateway.add_worker("w1", Script(answer="x" * 20, interval_s=0.02))
        call = gateway.call(REQUEST)
        await worker.wait_until(lambda: worker.running)
        running = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer())
        assert (running.tenant, running.running, running.used_tokens) == ("alice", 1, 0)
        assert running.reserved_tokens == PROMPT_TOKENS + 100
        assert [event async for event in call]
        await gateway.wait_idle()
        ended = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer())
        assert (ended.running, ended.reserved_tokens, ended.used_tokens) == (0, 0, PROMPT_TOKENS + 20)
        assert ended.window.seconds == 60
        assert -1 <= time.time() - ended.window_start.ToMicroseconds() / 1e6 <= 61
        assert not ended.HasField("tokens_per_minute")
        assert not ended.HasField("concurrency")
        assert ended.weight == 1


# How a client goes away.
Leave: TypeAlias = Callable[[], object]


async def begin_by_grpc(gateway: GatewayWorld, _: str, subject: str) -> Leave:
    """A client that has read some messages."""
    call = gateway.call(pb.GenerateRequest(text="hi", max_tokens=400), metadata=bearer(subject=subject))
    async for event in call:
        if event.HasField("chunk") and event.chunk.index >= 2 * BATCH:
            break
    leave: Leave = call.cancel
    return leave


async def begin_by_http(_: GatewayWorld, url: str, subject: str) -> Leave:
    """The same by server-sent events through Envoy; it closes its socket."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    writer.write(request_bytes(subject, text="hi", max_tokens=400, stream=True))
    for _chunk in range(3):
        await reader.readuntil(b"event: chunk\n")
    return writer.close


@pytest.mark.parametrize("begin", [begin_by_grpc, begin_by_http], ids=["grpc", "http"])
async def test_a_disconnect_is_at_the_worker_at_once_and_charged_by_what_was_produced(
    begin: Callable[[GatewayWorld, str, str], Awaitable[Leave]], tmp_path: Path
) -> None:
    """Nothing stays reserved, the worker stops within 100 ms, and what it made is charged within a chunk."""
    delays_s: list[float] = []
    async with open_gateway() as gateway, envoy_before(tmp_path, gateway.address) as url:
        worker = await gateway.add_worker("w1", Script(answer="x" * 400, interval_s=0.03, batch=BATCH))
        for tenant in "abcdefg":
            await early_in_a_minute()
            leave = await begin(gateway, url, tenant)
            left_s, before = time.monotonic(), len(worker.cancelled)
            leave()
            await worker.wait_until(lambda before=before: len(worker.cancelled) > before)
            delays_s.append(time.monotonic() - left_s)
            await gateway.wait_idle()
            usage = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer(subject=tenant))
            produced = worker.sent[worker.cancelled[-1]]
            assert produced >= 3 * BATCH
            assert usage.reserved_tokens == 0
            assert 0 <= PROMPT_TOKENS + produced - usage.used_tokens <= BATCH
    # A machine that is busy with others delays some of them; the code delays all or none.
    assert statistics.median(delays_s) < 0.1, delays_s


async def test_usage_is_the_callers_own_and_needs_a_scope() -> None:
    """Another subject has used nothing; a token without either scope is refused."""
    async with open_gateway() as gateway:
        await gateway.add_worker("w1", Script(answer="x"))
        await gateway.generate(REQUEST)
        await gateway.wait_idle()
        reader = bearer(make_token("bob", "generate"))
        usage = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=reader)
        assert (usage.tenant, usage.used_tokens) == ("bob", 0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer(make_token("bob", "admin")))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_limits_that_no_message_holds_are_told_as_the_largest() -> None:
    """A token may ask for any number; its calls are answered, and so is the question what it may use."""
    huge = mint(
        SECRET,
        subject="alice",
        scopes=["generate"],
        ttl_s=60,
        extra={"interlock": {"tokens_per_minute": 10**30, "concurrency": 9_999_999_999}},
    )
    async with open_gateway() as gateway:
        await gateway.add_worker("w1", Script(answer="x"))
        assert [event async for event in gateway.call(REQUEST, metadata=bearer(huge))]
        usage = await gateway.stub.GetUsage(pb.GetUsageRequest(), metadata=bearer(huge))
        assert (usage.tokens_per_minute, usage.concurrency) == (LIMIT_MAX, LIMIT_MAX)


async def test_a_limited_tenant_reads_in_the_headers_what_is_left() -> None:
    """By gRPC and HTTP, resumable or not, and with the refusal; others read nothing of it."""
    await early_in_a_minute()
    limited = TenantBounds(default=TenantLimits(tokens_per_minute=100, concurrency=4))
    async with open_gateway(tenants=limited) as gateway:
        await gateway.add_worker("w1", Script(answer="x"))
        cost = PROMPT_TOKENS + 10
        call = gateway.call(pb.GenerateRequest(text="hi", max_tokens=10))
        headers = {str(name): str(value) for name, value in await call.initial_metadata()}
        assert headers["x-ratelimit-limit-tokens"] == "100"
        assert headers["x-ratelimit-remaining-tokens"] == str(100 - cost)
        assert 0 < int(headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 60
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == (
            "4",
            "3",
        )
        _ = [event async for event in call]
        await gateway.wait_idle()
        used = PROMPT_TOKENS + 1
        for fields in ({"stream": True}, {"stream": True, "resumable": True}):
            reply = await gateway.post({"text": "hi", "max_tokens": 10, **fields})
            assert reply.headers["x-ratelimit-remaining-tokens"] == str(100 - used - cost)
            await gateway.wait_idle()
            used += PROMPT_TOKENS + 1
        refused = await gateway.post({"text": "hi", "max_tokens": 90})
        assert (refused.status, refused.json["error"]["reason"]) == (429, "ERROR_REASON_QUOTA_EXCEEDED")
        assert refused.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    async with open_gateway() as gateway:
        await gateway.add_worker("w1", Script(answer="x"))
        reply = await gateway.post({"text": "hi", "max_tokens": 1})
        assert not [name for name in reply.headers if name.startswith("x-ratelimit")]
