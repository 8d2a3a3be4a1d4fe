"""The native HTTP API around a stream: resumption, cancellation, heartbeats, and the console page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2 as pb

from services.gateway.http import reply as http_reply
from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL, GatewayWorld, HttpReply, bearer, open_gateway, read_reply


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway without a worker."""
    async with open_gateway() as world:
        yield world


def resume(gateway: GatewayWorld, request_id: str, last_event_id: str = "", **fields: Any) -> Any:
    """Begins a resumption as Envoy would."""
    metadata = (*bearer(), ("last-event-id", last_event_id)) if last_event_id else bearer()
    request = pb.ResumeRequest(request_id=request_id, **fields)
    return gateway.http.Resume(request, metadata=metadata)


async def read_on(call: Any) -> HttpReply:
    """The rest of a stream that was begun with `read`."""
    bodies = []
    while (body := await call.read()) is not grpc.aio.EOF:
        bodies.append(body.data)
    return HttpReply(200, {}, bodies, "text/event-stream; charset=utf-8")


async def test_a_cut_stream_goes_on_behind_the_last_event_id(gateway: GatewayWorld) -> None:
    """The ids count on, no text is lost or doubled, and the headers name who answers."""
    worker = await gateway.add_worker("w1", Script(answer="one two three four", interval_s=0.01))
    body = b'{"text": "hi", "request_id": "mine", "resumable": true, "stream": true}'
    call = gateway.http.Generate(HttpBody(data=body), metadata=bearer())
    first = [await call.read() for _ in range(3)]
    call.cancel()
    begun = HttpReply(200, {}, [one.data for one in first], first[0].content_type).events
    rest = await read_reply(resume(gateway, "mine", begun[-1]["id"]))
    assert (rest.status, rest.content_type) == (200, "text/event-stream; charset=utf-8")
    assert (rest.headers["x-request-id"], rest.headers["x-interlock-worker"]) == ("mine", "w1")
    events = begun + rest.events
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    chunks = [event["data"]["chunk"]["text"] for event in events if event["event"] == "chunk"]
    assert "".join(chunks) == "one two three four"
    assert events[-1]["event"] == "finished"
    assert len(worker.starts) == 1
    # After the end all of it is there, from the first event on, or behind the cursor in the query.
    assert (await read_reply(resume(gateway, "mine"))).events == events
    assert (await read_reply(resume(gateway, "mine", cursor=2))).events == events[2:]
    over = await read_reply(resume(gateway, "mine", str(len(events))))
    assert (over.status, over.bodies, over.content_type) == (204, [b""], "text/event-stream; charset=utf-8")
    late = await read_reply(resume(gateway, "mine", str(len(events) + 1)))
    assert (late.status, late.json["error"]["message"]) == (400, f"cursor: the log has {len(events)} events.")


@pytest.mark.parametrize(
    ("request_id", "last_event_id", "status", "named"),
    [
        ("unknown", "", 404, "request"),
        ("a b", "", 400, "request_id"),
        ("unknown", "-1", 400, "last-event-id"),
        ("unknown", "1e3", 400, "last-event-id"),
        ("unknown", "9" * 30, 400, "last-event-id"),
        ("unknown", "9" * 18, 400, "cursor"),
    ],
)
async def test_a_senseless_resumption_is_refused(
    gateway: GatewayWorld, request_id: str, last_event_id: str, status: int, named: str
) -> None:
    """With a status and a message that names what is wrong."""
    reply = await read_reply(resume(gateway, request_id, last_event_id))
    assert (reply.status, named in reply.json["error"]["message"]) == (status, True), reply.json


async def test_a_request_is_cancelled_by_its_id(gateway: GatewayWorld) -> None:
    """Its stream ends with an error, the slot is free, and a second cancellation says that it had ended."""
    worker = await gateway.add_worker("w1", Script(answer="x" * 200, interval_s=0.01))
    body = b'{"text": "hi", "request_id": "mine", "resumable": true, "stream": true, "max_tokens": 200}'
    call = gateway.http.Generate(HttpBody(data=body), metadata=bearer())
    await call.read()
    cancel = pb.CancelRequest(request_id="mine")
    reply = await read_reply(gateway.http.Cancel(cancel, metadata=bearer()))
    assert (reply.status, reply.json) == (200, {"request_id": "mine", "cancelled": True})
    rest = await read_on(call)
    assert rest.events[-1]["data"]["error"]["code"] == "CANCELLED"
    await worker.wait_until(lambda: not worker.running)
    foreign = await read_reply(gateway.http.Cancel(cancel, metadata=bearer(subject="mallory")))
    assert foreign.status == 404


async def test_a_waiting_stream_has_heartbeats(
    gateway: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is there to answer: the stream begins without a worker's name, and comments fill it."""
    monkeypatch.setattr(http_reply, "BEGIN_WAIT_S", 0.02)
    monkeypatch.setattr(http_reply, "HEARTBEAT_S", 0.02)
    call = gateway.http.Generate(HttpBody(data=b'{"text": "hi", "stream": true}'), metadata=bearer())
    bodies = [await call.read() for _ in range(4)]
    headers = dict(await call.initial_metadata())
    assert b": waiting\n\n" in [body.data for body in bodies]
    assert "x-interlock-worker" not in headers
    await gateway.add_worker("w1", Script(answer="late"))
    rest = await read_on(call)
    assert rest.events[-1]["event"] == "finished"


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("CreateChatCompletion", {"messages": [{"role": "user", "content": "hi"}]}),
        ("CreateCompletion", {"prompt": "hi"}),
        ("CreateResponse", {"input": "hi"}),
        ("CreateMessage", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
    ],
)
async def test_a_waiting_stream_of_a_vendors_begins(
    gateway: GatewayWorld, monkeypatch: pytest.MonkeyPatch, method: str, asked: dict[str, Any]
) -> None:
    """Its API has no word for a place in the queue: its first body is a heartbeat, and brings the headers."""
    monkeypatch.setattr(http_reply, "BEGIN_WAIT_S", 0.02)
    data = json.dumps({"model": MODEL, "stream": True, **asked}).encode()
    call = getattr(gateway.http, method)(HttpBody(data=data), metadata=bearer())
    assert (await asyncio.wait_for(call.read(), 5)).data == b": waiting\n\n"
    await gateway.add_worker("w1", Script(answer="ü"))
    assert "ü".encode() in b"".join((await read_on(call)).bodies)


async def test_the_headers_of_a_stream_do_not_wait_for_ever_for_its_first_text(
    gateway: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker says nothing yet: the stream begins with the worker's name, and comments fill it."""
    monkeypatch.setattr(http_reply, "BEGIN_WAIT_S", 0.2)
    monkeypatch.setattr(http_reply, "HEARTBEAT_S", 0.02)
    await gateway.add_worker("w1", Script(stall_at=0))
    for more in (b"", b', "resumable": true'):
        data = b'{"text": "hi", "stream": true%s}' % more
        call = gateway.http.Generate(HttpBody(data=data), metadata=bearer())
        bodies = [(await call.read()).data for _ in range(4)]
        assert b": waiting\n\n" in bodies
        assert dict(await call.initial_metadata())["x-interlock-worker"] == "w1"
        call.cancel()


async def test_the_console_is_one_page_that_runs_nothing_foreign(gateway: GatewayWorld) -> None:
    """Its policy names its own script and style by digest, and it refers to nothing elsewhere."""
    reply = await read_reply(gateway.http.Console(HttpBody()))
    assert (reply.status, reply.content_type) == (200, "text/html; charset=utf-8")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = reply.bodies[0].decode()
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|(src|href)=", page)
