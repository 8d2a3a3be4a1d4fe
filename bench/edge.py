"""What the way through Envoy and HTTP costs: time to the first token and tokens/s, beside the worker's own.

    interlock up                                    # in another terminal; --up starts one for the measurement
    python -m bench.edge [--rounds 5] [--streams 32] [--json FILE]

One client asks one worker in two ways in turns, with the same token ids and lengths, greedily: `edge` is
`POST /v1/generate` with server-sent events through Envoy and a gateway, a connection a request; `worker` is a
session with the worker itself. A round measures single requests of an idle mesh, then `--streams` at once,
each in both ways; which way goes first changes from round to round. Each prompt is asked once before, so that
both ways find the same in the worker's cache of prefixes; with `--fresh` every request has a prompt of its
own instead. Told are medians over the rounds, and those of the rounds' ratios. The client's own work counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.progress import Progress

from bench.load_callers import Caller
from bench.load_direct import open_direct
from bench.load_http import HttpCaller
from bench.load_plan import Ask, Load, Tenant, ask_of
from bench.load_trace import Fate, Trace
from bench.load_world import NoMesh, find, started, tokens_of
from bench.race.machine_facts import processor_line

WORKER, EDGE = "worker", "edge"
# Prompts are drawn anew in each run and the same in all of them.
SEED = 7


class Unanswered(Exception):
    """A request had no answer, so that there is nothing to compare; the message says what to do."""


@dataclass(slots=True)
class Round:
    """What one round found, by way.

    Attributes:
        first_s: Times to the first token of single requests, in seconds.
        tokens: What all streams together brought.
        wall_s: How long that took, in seconds.
    """

    first_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def ttft_ms(self, way: str) -> float:
        """The median time to the first token, in milliseconds."""
        return statistics.median(self.first_s[way]) * 1_000

    def tokens_per_s(self, way: str) -> float:
        """Tokens in a second, of all streams."""
        return self.tokens[way] / self.wall_s[way]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked.

    Attributes:
        load: Lengths of prompts and answers.
        rounds: How often everything is measured.
        streams: Requests at once.
        idle_requests: Single requests of a round, in each way.
        fresh: Whether every request has a prompt of its own.
    """

    load: Load
    rounds: int = 5
    streams: int = 32
    idle_requests: int = 20
    fresh: bool = False


class Bench:
    """Asks in both ways."""

    def __init__(self, ways: Mapping[str, Caller], plan: Plan) -> None:
        self._ways = ways
        self._plan = plan
        self._chance = Random(SEED)  # noqa: S311 - it draws prompts
        self._kept = [self._draw() for _ in range(max(plan.streams, plan.idle_requests))]

    async def measure(self, tick: Callable[[], object]) -> list[Round]:
        """All rounds, after one that is not counted.

        Raises:
            Unanswered: A request was refused or failed.
        """
        await self._round(0)
        rounds = []
        for number in range(self._plan.rounds):
            rounds.append(await self._round(number))
            tick()
        return rounds

    async def _round(self, number: int) -> Round:
        order = (WORKER, EDGE) if number % 2 == 0 else (EDGE, WORKER)
        found = Round(first_s={way: [] for way in order})
        for at in range(self._plan.idle_requests):
            for way in order:
                (trace,) = await self._ask(way, [self._prompt(at)])
                found.first_s[way].append(trace.arrivals[0][0] - trace.began_s)
        for way in order:
            asks = [self._prompt(at) for at in range(self._plan.streams)]
            began_s = time.monotonic()
            traces = await self._ask(way, asks)
            found.wall_s[way] = time.monotonic() - began_s
            found.tokens[way] = sum(trace.tokens for trace in traces)
        return found

    async def _ask(self, way: str, asks: Sequence[Ask]) -> list[Trace]:
        """Asks all at once; returns when all are answered."""
        began_s = time.monotonic()
        traces = [Trace(ask.tenant.name, began_s, began_s) for ask in asks]
        caller = self._ways[way]
        await asyncio.gather(*(caller.ask(ask, trace) for ask, trace in zip(asks, traces, strict=True)))
        for trace in traces:
            if trace.fate is not Fate.FINISHED or not trace.arrivals:
                raise Unanswered(
                    f"one of {len(asks)} requests by way of the {way} was {trace.fate.value}. Ask for no "
                    "more --streams than the worker has slots (INTERLOCK_WORKER_SLOTS); let nobody else ask."
                )
        return traces

    def _prompt(self, at: int) -> Ask:
        return self._draw() if self._plan.fresh else self._kept[at]

    def _draw(self) -> Ask:
        return ask_of(self._plan.load, self._plan.load.tenants[0], self._chance)


def report(plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds, and those of the rounds' own ratios."""
    return {
        "machine": processor_line(),
        "rounds": plan.rounds,
        "streams": plan.streams,
        "idle_requests": plan.idle_requests,
        "prompt_tokens": plan.load.prompt_tokens,
        "answer_tokens": plan.load.answer_tokens,
        "fresh_prompts": plan.fresh,
        "ttft_ms": {
            **_medians(rounds, Round.ttft_ms, 2),
            "rise": _median(rounds, lambda one: one.ttft_ms(EDGE) - one.ttft_ms(WORKER), 2),
            "ratio": _median(rounds, lambda one: one.ttft_ms(EDGE) / one.ttft_ms(WORKER), 3),
        },
        "tokens_per_s": {
            **_medians(rounds, Round.tokens_per_s, 1),
            "ratio": _median(rounds, lambda one: one.tokens_per_s(EDGE) / one.tokens_per_s(WORKER), 3),
            "ratios": [round(one.tokens_per_s(EDGE) / one.tokens_per_s(WORKER), 3) for one in rounds],
        },
        # The same in both ways, or the machine's arithmetic depends on the batch.
        "tokens": {way: sum(one.tokens[way] for one in rounds) for way in (WORKER, EDGE)},
    }


def _medians(rounds: Sequence[Round], figure: Callable[[Round, str], float], digits: int) -> dict[str, float]:
    return {
        way: round(statistics.median(figure(one, way) for one in rounds), digits) for way in (WORKER, EDGE)
    }


def _median(rounds: Sequence[Round], figure: Callable[[Round], float], digits: int) -> float:
    return round(statistics.median(map(figure, rounds)), digits)


def lines_of(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    ttft, speed = found["ttft_ms"], found["tokens_per_s"]
    first = f"worker {ttft[WORKER]:g} ms, through Envoy and HTTP {ttft[EDGE]:g} ms"
    many = f"worker {speed[WORKER]:g} tokens/s, through Envoy and HTTP {speed[EDGE]:g}"
    return [
        f"{found['machine']}; medians of {found['rounds']} rounds",
        f"TTFT, idle: {first}: {ttft['rise']:+g} ms, {ttft['ratio']:g} times",
        f"{found['streams']} streams: {many}: {speed['ratio']:.1%}",
    ]


async def run(plan: Plan) -> dict[str, Any]:
    """Measures the mesh of this home.

    Raises:
        NoMesh: None runs.
        Unanswered: It has more than one worker, or did not answer.
    """
    target = find()
    if target.workers != 1:
        raise Unanswered(f"the mesh has {target.workers} workers; one is compared with the way to it.")
    async with AsyncExitStack() as exits:
        direct = await exits.enter_async_context(open_direct(target.worker, target.mesh_token, target.model))
        edge = HttpCaller(target.address, tokens_of(plan.load, target.jwt_secret))
        bench = Bench({WORKER: direct, EDGE: edge}, plan)
        with Progress(transient=True) as progress:
            task = progress.add_task("measuring", total=plan.rounds)
            rounds = await bench.measure(lambda: progress.advance(task))
    return report(plan, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the ratios, and writes all figures where asked to."""
    arguments = _parse(argv)
    load = Load(
        tenants=(Tenant("edge"),),
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
    )
    plan = Plan(load, arguments.rounds, arguments.streams, arguments.idle_requests, arguments.fresh)
    try:
        with started(up=arguments.up):
            found = asyncio.run(run(plan))
    except (NoMesh, Unanswered, subprocess.CalledProcessError) as error:
        print(f"bench edge: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines_of(found)))
    print(json.dumps(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="interlock bench edge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="at once (%(default)s)")
    parser.add_argument("--idle-requests", type=int, default=20, metavar="N", help="a round (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="a prompt of its own for each request")
    parser.add_argument("--up", action="store_true", help="start a mesh in this home, stop it afterwards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.streams, arguments.idle_requests) < 1:
        parser.error("--rounds, --streams and --idle-requests are at least 1")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
