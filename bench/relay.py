"""What a gateway costs: its tokens/s and requests/s beside those of a bare relay, and the TTFT that it adds.

    python -m bench.relay [--model DIRECTORY] [--rounds 5] [--check]

Everything runs on this machine: a source of tokens, a relay that hands streams on and does nothing else, and
a gateway with authentication, its queue in Redis and detokenization; one client drives both in turns. The
relay gets a token a message, the gateway a message a step for all its streams, as from a worker. Where the
gateway merges tokens that came while a client was written to, fewer messages reach the client: both are
counted. Processor time is that of the relay's and the gateway's own process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from interlock.v1 import gateway_service_pb2, worker_service_pb2, worker_service_pb2_grpc
from rich.progress import Progress

from bench.relay_world import MODEL, REVISION, Server, World, open_world
from services.common.channel import connect
from services.common.credential import mesh_metadata
from tests.fakes.scripted_worker import MESH_TOKEN

GENERATE = "/interlock.v1.GatewayService/Generate"
PROMPT = "Write a very long story about a traveller, with many chapters."
GOALS = {"tokens": 0.6, "requests": 0.5, "ttft_ms": 8.0}


@dataclass(frozen=True, slots=True)
class Round:
    """What one round measured.

    Attributes:
        units: Tokens, or requests.
        messages: Messages that reached the client.
        wall_s: How long it took.
        cpu_s: Processor time of the process between client and source.
    """

    units: int
    messages: int
    wall_s: float
    cpu_s: float


class Client:
    """A caller of Generate that reads bytes and counts them, so that it costs little."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        # Without a deserializer the bytes of each message are handed over as they are.
        self._call: Any = channel.unary_stream(GENERATE)
        self._metadata = metadata

    async def count(self, request: bytes) -> int:
        """Reads an answer to its end; returns how many messages it had."""
        messages = 0
        async for _ in self._call(request, metadata=self._metadata):
            messages += 1
        return messages

    async def first_token_s(self, request: bytes) -> float:
        """Seconds until the first tokens of an answer."""
        began_s, first_s = time.perf_counter(), 0.0
        async for data in self._call(request, metadata=self._metadata):
            event = gateway_service_pb2.GenerateResponse.FromString(data)
            if event.HasField("chunk") and not first_s:
                first_s = time.perf_counter() - began_s
        return first_s


def request_of(tokens: int) -> bytes:
    """A request for an answer of `tokens` tokens."""
    return gateway_service_pb2.GenerateRequest(text=PROMPT, max_tokens=tokens).SerializeToString()


async def stream_round(client: Client, server: Server, streams: int, tokens: int) -> Round:
    """`streams` answers of `tokens` tokens at once."""
    request = request_of(tokens)
    cpu_s, began_s = server.cpu_s(), time.perf_counter()
    messages = await asyncio.gather(*(client.count(request) for _ in range(streams)))
    wall_s = time.perf_counter() - began_s
    return Round(streams * tokens, sum(messages), wall_s, server.cpu_s() - cpu_s)


async def admit_round(client: Client, server: Server, clients: int, requests: int) -> Round:
    """`clients` that each ask for one token after another."""
    request = request_of(1)

    async def ask() -> int:
        return sum([await client.count(request) for _ in range(requests)])

    cpu_s, began_s = server.cpu_s(), time.perf_counter()
    messages = await asyncio.gather(*(ask() for _ in range(clients)))
    wall_s = time.perf_counter() - began_s
    return Round(clients * requests, sum(messages), wall_s, server.cpu_s() - cpu_s)


class DirectWorker:
    """A caller of the worker itself, over a session that stays open."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        metadata = mesh_metadata(MESH_TOKEN, **{"x-interlock-gateway-id": "bench"})
        self._call: Any = worker_service_pb2_grpc.WorkerServiceStub(channel).Session(metadata=metadata)
        self._jobs = 0

    async def first_token_s(self) -> float:
        """Seconds from an order to its first tokens."""
        self._jobs += 1
        start = worker_service_pb2.StartJob(
            job=str(self._jobs), attempt=1, model=MODEL, revision=REVISION, prompt_ids=[1], max_tokens=1,
            credit_tokens=256,
        )  # fmt: skip
        began_s = time.perf_counter()
        await self._call.write(worker_service_pb2.SessionRequest(start=start))
        async for response in self._call:
            if response.HasField("step"):
                break
        return time.perf_counter() - began_s

    def close(self) -> None:
        """Ends the session."""
        self._call.cancel()


async def measure(world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds in turns and returns the figures."""
    async with AsyncExitStack() as exits:
        channels = [
            await exits.enter_async_context(connect(server.address))
            for server in (world.relay, world.gateway, world.source)
        ]
        bare = Client(channels[0], ())
        gateway = Client(channels[1], (("authorization", f"Bearer {world.bearer}"),))
        direct = DirectWorker(channels[2])
        exits.callback(direct.close)
        await _await_serving(gateway)
        sides = (("relay", bare, world.relay), ("gateway", gateway, world.gateway))
        streams: dict[str, list[Round]] = {"relay": [], "gateway": []}
        admissions: dict[str, list[Round]] = {"relay": [], "gateway": []}
        firsts: dict[str, list[float]] = {"direct": [], "gateway": []}
        with Progress(transient=True) as progress:
            for _ in progress.track(range(arguments.rounds), description="measuring"):
                for name, client, server in sides:
                    streams[name].append(
                        await stream_round(client, server, arguments.streams, arguments.tokens)
                    )
                for name, client, server in sides:
                    admissions[name].append(
                        await admit_round(client, server, arguments.streams, arguments.requests)
                    )
                await _idle_firsts(direct, gateway, firsts, arguments.idle_requests)
        return report(streams, admissions, firsts)


async def _idle_firsts(
    direct: DirectWorker, gateway: Client, firsts: dict[str, list[float]], requests: int
) -> None:
    """Single requests, one way and the other."""
    request = request_of(1)
    for _ in range(requests):
        firsts["direct"].append(await direct.first_token_s())
        firsts["gateway"].append(await gateway.first_token_s(request))


async def _await_serving(client: Client) -> None:
    """Returns once the gateway has been taken in, with its connections open."""
    until_s = time.monotonic() + 30.0
    while True:
        try:
            await client.count(request_of(2))
        except grpc.aio.AioRpcError:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(0.05)
        else:
            return


def report(
    streams: dict[str, list[Round]], admissions: dict[str, list[Round]], firsts: dict[str, list[float]]
) -> dict[str, Any]:
    """The medians over the rounds, and the ratios of what was measured in the same round."""
    direct_ms, gateway_ms = (statistics.median(firsts[name]) * 1_000 for name in ("direct", "gateway"))
    return {
        "goals": GOALS,
        "tokens": {
            "per_s": _medians(streams, lambda one: one.units / one.wall_s),
            "messages_per_s": _medians(streams, lambda one: one.messages / one.wall_s),
            "cpu_us_each": _medians(streams, lambda one: one.cpu_s / one.units * 1e6),
            "ratio": _ratio(streams, lambda one: one.units / one.wall_s),
            "ratio_of_messages": _ratio(streams, lambda one: one.messages / one.wall_s),
            "ratio_by_cpu": _ratio(streams, lambda one: one.units / one.cpu_s),
            "ratio_of_messages_by_cpu": _ratio(streams, lambda one: one.messages / one.cpu_s),
        },
        "requests": {
            "per_s": _medians(admissions, lambda one: one.units / one.wall_s),
            "cpu_us_each": _medians(admissions, lambda one: one.cpu_s / one.units * 1e6),
            "ratio": _ratio(admissions, lambda one: one.units / one.wall_s),
            "ratio_by_cpu": _ratio(admissions, lambda one: one.units / one.cpu_s),
        },
        "ttft_ms": {
            "direct": round(direct_ms, 2),
            "gateway": round(gateway_ms, 2),
            "rise": round(gateway_ms - direct_ms, 2),
        },
    }


def _medians(rounds: dict[str, list[Round]], figure: Callable[[Round], float]) -> dict[str, float]:
    return {name: round(statistics.median(map(figure, found)), 1) for name, found in rounds.items()}


def _ratio(rounds: dict[str, list[Round]], figure: Callable[[Round], float]) -> float:
    pairs = zip(rounds["gateway"], rounds["relay"], strict=True)
    return round(statistics.median(figure(gateway) / figure(relay) for gateway, relay in pairs), 3)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Opens the world and measures in it."""
    async with open_world(arguments.model, profile=arguments.profile) as world:
        return await measure(world, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 where a goal is missed and `--check` asks for it."""
    parser = argparse.ArgumentParser(
        prog="interlock bench relay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="directory with tokenizer.json (a small tokenizer)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32, help="streams at once (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a stream (%(default)s)")
    parser.add_argument("--requests", type=int, default=15, help="one-token requests a client (%(default)s)")
    parser.add_argument("--idle-requests", type=int, default=30, help="of each way, for TTFT (%(default)s)")
    parser.add_argument("--profile", type=Path, help="write a profile (cProfile) of the gateway to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    arguments = parser.parse_args(argv)
    found = asyncio.run(run(arguments))
    print(json.dumps(found, indent=2))
    return int(arguments.check and not meets_goals(found))


def meets_goals(found: dict[str, Any]) -> bool:
    """Whether the gateway is as light as it shall be."""
    return bool(
        found["tokens"]["ratio"] >= GOALS["tokens"]
        and found["requests"]["ratio"] >= GOALS["requests"]
        and found["ttft_ms"]["rise"] <= GOALS["ttft_ms"]
    )


if __name__ == "__main__":
    raise SystemExit(main())
