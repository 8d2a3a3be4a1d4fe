"""Two real gateways behind a real Envoy: what a gateway that leaves costs those who call."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc

from deploy.envoy.parameters import Endpoint, Parameters
from services.local import leash, probes
from services.local.envoy_proxy import EnvoyProxy
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import GatewayWorld, bearer, make_token, open_gateway


@dataclass(frozen=True, slots=True)
class Pair:
    """Two gateways and the one address that clients know."""

    address: str
    gateways: tuple[GatewayWorld, GatewayWorld]

    def post(self) -> tuple[int, dict[str, str], Any]:
        """One request over HTTP: status, headers and body."""
        request = urllib.request.Request(
            f"http://{self.address}/v1/generate",
            b'{"text": "hi"}',
            {"authorization": f"Bearer {make_token()}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:  # noqa: S310 - see above
                return reply.status, dict(reply.headers), json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), json.loads(error.read())


@contextmanager
def _edge(run: Path, gateways: tuple[GatewayWorld, ...]) -> Iterator[EnvoyProxy]:
    """An Envoy before the gateways."""
    parameters = Parameters(
        listen=Endpoint("127.0.0.1", 0),
        admin=run / "admin.sock",
        gateways=tuple(Endpoint.parse(gateway.address) for gateway in gateways),
    )
    proxy = EnvoyProxy(run, parameters)
    leashed = (sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *proxy.command())
    with (run / "envoy.log").open("wb") as log, subprocess.Popen(leashed, stdout=log, stderr=log) as process:
        try:
            yield proxy
        finally:
            process.terminate()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two gateways, each with a worker of its own; both get calls, as before Envoy's next look at them."""
    async with open_gateway() as first, open_gateway() as second:
        gateways = (first, second)
        for number, gateway in enumerate(gateways):
            await gateway.add_worker(f"w{number}", slots=64)
        with _edge(tmp_path, gateways) as proxy:
            bound = await asyncio.wait_for(probes.until(proxy.bound), 20)
            yield Pair(str(bound.http), gateways)


async def _codes(pair: Pair, count: int) -> set[str]:
    """How that many calls over gRPC end."""
    async with grpc.aio.insecure_channel(pair.address) as channel:
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)

        async def call() -> str:
            try:
                events = [
                    event async for event in stub.Generate(pb.GenerateRequest(text="hi"), metadata=bearer())
                ]
            except grpc.aio.AioRpcError as error:
                metadata = dict(error.initial_metadata() or ()) | dict(error.trailing_metadata() or ())
                assert "x-interlock-unstarted" not in metadata
                return f"{error.code().name} {metadata.get('interlock-reason')}"
            assert events[-1].HasField("finished")
            return "OK"

        return set(await asyncio.gather(*(call() for _ in range(count))))


async def test_a_call_that_a_draining_gateway_refuses_is_given_to_another(pair: Pair) -> None:
    """Between its refusal and Envoy's next look nobody is told: gRPC and HTTP succeed, and run once."""
    leaving, staying = pair.gateways
    leaving.reception.drain()
    assert await _codes(pair, 30) == {"OK"}
    replies = [await asyncio.to_thread(pair.post) for _ in range(10)]
    assert {status for status, _, _ in replies} == {200}
    assert not leaving.workers["w0"].starts
    assert len(staying.workers["w1"].starts) == 40


async def test_where_all_drain_the_refusal_arrives(pair: Pair) -> None:
    """Nobody is left to try: the gateway's own error and delay, and no word of the mesh's insides."""
    for gateway in pair.gateways:
        gateway.reception.drain()
    assert await _codes(pair, 4) == {"UNAVAILABLE ERROR_REASON_DRAINING"}
    status, headers, body = await asyncio.to_thread(pair.post)
    assert (status, body["error"]["reason"]) == (503, "ERROR_REASON_DRAINING")
    assert "retry-after" in headers
    assert not [name for name in headers if "unstarted" in name.lower()]


async def test_what_began_is_never_given_to_another(pair: Pair) -> None:
    """A gateway that ends a running request says so to its client, although another one could take it."""
    workers = [next(iter(gateway.workers.values())) for gateway in pair.gateways]
    for worker in workers:
        worker.script.interval_s = 0.1
    calls = asyncio.create_task(_codes(pair, 8))

    async def all_begun() -> bool | None:
        return sum(len(worker.starts) for worker in workers) == 8 or None

    await asyncio.wait_for(probes.until(all_begun), 10)
    assert all(worker.starts for worker in workers)
    await pair.gateways[0].dispatcher.drain(0)
    assert await calls == {"OK", "UNAVAILABLE ERROR_REASON_DRAINING"}
    assert sum(len(worker.starts) for worker in workers) == 8


def _heard(address: str) -> tuple[bytes, list[tuple[int, str | None, bytes]]]:
    """A resumable stream, and what one more connection hears behind its end: twice there, and of health."""
    connection = http.client.HTTPConnection(address, timeout=20)
    known = {"authorization": f"Bearer {make_token()}"}

    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, known | sent)
        return connection.getresponse()

    try:
        body = b'{"text": "hi", "request_id": "mine", "resumable": true, "stream": true}'
        events = ask("POST", "/v1/generate", body).read()
        last = events.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
        heard = []
        for path in ("/v1/generate/mine", "/v1/generate/mine", "/healthz"):
            reply = ask("GET", path, last_event_id=last)
            heard.append((reply.status, reply.getheader("content-type"), reply.read()))
        return events, heard
    finally:
        connection.close()


async def test_behind_the_last_event_a_browser_is_told_to_ask_no_more(tmp_path: Path) -> None:
    """204, in the type of events, without a byte that its connection's next reply would begin with."""
    async with open_gateway() as gateway, envoy_before(tmp_path, gateway.address) as url:
        await gateway.add_worker("w1")
        events, heard = await asyncio.to_thread(_heard, url.removeprefix("http://"))
        assert b"event: finished" in events
        nothing = (204, "text/event-stream; charset=utf-8", b"")
        assert heard == [nothing, nothing, (200, "application/json", b'{"status":"alive"}')]
