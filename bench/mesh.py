"""How a running mesh's throughput grows with the number of requests at once.

    interlock up                      # in another terminal
    python -m bench.mesh [--concurrency 1,16] [--rounds 5] [--tokens 64]

Prints one JSON object: median tokens/s and time to the first token for each concurrency, and the ratio to the
first. The concurrencies take turns, so that a machine whose speed drifts favours none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc
from rich.progress import track

# Open-ended on purpose: every answer shall run to its token limit.
PROMPT = "Write a very long story about traveller number {number}, with many chapters."


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request produced: its tokens, and the seconds until the first of them."""

    tokens: int
    first_token_s: float


async def ask(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, token: str, number: int, tokens: int
) -> Answer:
    """Generates one answer and counts it."""
    request = pb.GenerateRequest(text=PROMPT.format(number=number), max_tokens=tokens)
    started_s, first_token_s, count = time.perf_counter(), 0.0, 0
    async for event in stub.Generate(request, metadata=(("authorization", f"Bearer {token}"),)):
        if event.HasField("chunk"):
            first_token_s = first_token_s or time.perf_counter() - started_s
            count += len(event.chunk.token_ids)
    return Answer(count, first_token_s)


async def round_of(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, token: str, concurrency: int, tokens: int
) -> tuple[float, float]:
    """Returns tokens/s and the median time to the first token of `concurrency` requests at once."""
    started_s = time.perf_counter()
    answers = await asyncio.gather(*(ask(stub, token, number, tokens) for number in range(concurrency)))
    elapsed_s = time.perf_counter() - started_s
    first = statistics.median(answer.first_token_s for answer in answers)
    return sum(answer.tokens for answer in answers) / elapsed_s, first


async def measure(address: str, token: str, levels: list[int], rounds: int, tokens: int) -> dict[str, object]:
    """Measures every level once a round and returns the medians."""
    found: dict[int, list[tuple[float, float]]] = {level: [] for level in levels}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        await round_of(stub, token, max(levels), 8)
        for _ in track(range(rounds), description="measuring"):
            for level in levels:
                found[level].append(await round_of(stub, token, level, tokens))
    speed = {level: statistics.median(value for value, _ in found[level]) for level in levels}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rounds": rounds,
        "tokens_per_answer": tokens,
        "tokens_per_s": {level: round(speed[level], 1) for level in levels},
        "ratio": {level: round(speed[level] / speed[levels[0]], 2) for level in levels},
        "first_token_ms": {
            level: round(statistics.median(first for _, first in found[level]) * 1000, 1) for level in levels
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Finds the mesh by its state file, measures and prints."""
    parser = argparse.ArgumentParser(prog="interlock bench mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,16", help="requests at once, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    arguments = parser.parse_args(argv)
    home = Path(os.environ.get("INTERLOCK_HOME", ".interlock"))
    state = json.loads((home / "state.json").read_text())
    address = state["http"].removeprefix("http://").rstrip("/")
    token = Path(state["token_file"]).read_text().strip()
    levels = [int(level) for level in arguments.concurrency.split(",")]
    found = asyncio.run(measure(address, token, levels, arguments.rounds, arguments.tokens))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
