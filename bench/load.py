"""Loads a mesh and tells what its clients got: goodput, latencies, refusals, missed deadlines, shares.

    interlock bench load --clients 1 16 100 --without-queue --json load.json --chart load.png
    interlock bench load --up --gateways 2 --clients 64 --tenant small:1 --tenant large:3
    interlock bench load --rate 50 --deadline 20 --transport http
    interlock bench load --up --clients 50 100 200 400 --rounds 16 --duration 6 --mixed

It loads the mesh of $INTERLOCK_HOME, or starts one there (--up). A step is a number of clients that ask
again as soon as they are answered (--clients), or a rate of independent arrivals (--rate). A client that is
refused comes back when it was told to; an arrival does not. Prompts are random token ids, no two alike.
Requests that run when a step ends are cut; their tokens count. A machine's speed drifts: --rounds runs all
--clients steps so often, mixed, and tells the medians with what they are worth; the chart draws them. What
does not drift is told with each step: how many cores the workers had, and how many all others took.

--without-queue runs every --clients step a second time as it would be with no gateway: the same clients
straight at the first worker's session, all requests at once, and whoever is refused tries again at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.load_callers import Caller
from bench.load_chart import draw
from bench.load_direct import open_direct
from bench.load_figures import figures
from bench.load_plan import Load, Tenant, tenant
from bench.load_rounds import Summary, order, summaries
from bench.load_steps import Crowd, Step, Tick
from bench.load_world import NoMesh, Target, find, open_caller, processes, started, tokens_of

# What a cancelled request still costs its worker is over by then.
_SETTLING_S = 1.0


class Bench:
    """Runs steps against one mesh.

    Args:
        target: The mesh.
        load: What all steps have in common.
        transport: `grpc` or `http`.
    """

    def __init__(self, target: Target, load: Load, transport: str) -> None:
        self._target, self._load, self._transport = target, load, transport
        self._tokens = tokens_of(load, target.jwt_secret)
        # Not seeded: the mesh remembers the prompts of earlier runs.
        self._chance = random.Random()  # noqa: S311 - prompts are no secrets

    async def closed(self, clients: int, tick: Tick) -> dict[str, Any]:
        """One step of clients, through the mesh."""
        opened = open_caller(self._target.address, self._tokens, transport=self._transport, clients=clients)
        async with opened as caller:
            step = await self._crowd(caller).closed_loop(clients, tick)
        return self._told(step, clients=clients, rate=None, queue=True)

    async def direct(self, clients: int, tick: Tick) -> dict[str, Any]:
        """One step of clients, straight at the worker."""
        target = self._target
        async with open_direct(target.worker, target.mesh_token, target.model) as caller:
            step = await self._crowd(caller).closed_loop(clients, tick)
        return self._told(step, clients=clients, rate=None, queue=False)

    async def open(self, rate: float, tick: Tick) -> dict[str, Any]:
        """One step of arrivals, through the mesh."""
        # As many streams at once as arrive within ten seconds.
        clients = int(rate * 10) + 1
        opened = open_caller(self._target.address, self._tokens, transport=self._transport, clients=clients)
        async with opened as caller:
            step = await self._crowd(caller).open_loop(rate, tick)
        return self._told(step, clients=None, rate=rate, queue=True)

    def _crowd(self, caller: Caller) -> Crowd:
        return Crowd(caller, self._load, self._chance, processes)

    def _told(self, step: Step, **what: Any) -> dict[str, Any]:
        found = asdict(figures(step.traces, self._load.weights, step.window_s))
        return what | found | {"cores": dict(step.cores)}


async def run(bench: Bench, arguments: argparse.Namespace, load: Load) -> list[dict[str, Any]]:
    """Runs all steps, those with and without the queue in turns, and prints each as it ends."""
    sizes = order(arguments.clients, arguments.rounds, random.Random())  # noqa: S311 - no secrets
    plan = [(bench.closed, clients) for clients in sizes]
    if arguments.without_queue:
        plan = [(way, clients) for _, clients in plan for way in (bench.closed, bench.direct)]
    steps: list[tuple[Any, float]] = [*plan, *((bench.open, rate) for rate in arguments.rate)]
    found: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(steps) * (load.warmup_s + load.duration_s))
        for run_step, size in steps:
            progress.update(task, description=f"{run_step.__name__} {size:g}")
            told = await run_step(size, lambda seconds: progress.advance(task, seconds))
            found.append(told)
            progress.console.print(line_of(told))
            if (hint := hint_of(told, load)) is not None:
                progress.console.print(f"  {hint}", style="dim")
            await asyncio.sleep(_SETTLING_S)
    return found


def line_of(step: dict[str, Any]) -> str:
    """A step in one line."""
    offered = f"{step['clients']} clients" if step["rate"] is None else f"{step['rate']:g} requests/s"
    ttft, itl, refusal = step["ttft_ms"], step["itl_ms"], step["refusal_ms"]
    way = "" if step["queue"] else " without the queue"
    parts = [
        f"{offered}{way}: {step['goodput_tokens_per_s']:g} tokens/s",
        f"TTFT {_ms(ttft['p50'])}/{_ms(ttft['p95'])} ms",
        f"ITL {_ms(itl['p50'])}/{_ms(itl['p95'])} ms",
        f"refused {step['shed_rate']:.1%} in {_ms(refusal['p50'])}/{_ms(refusal['p95'])} ms",
        f"{step['missed_deadlines']} missed, {step['requests']['failed']} failed",
        f"Jain {step['jain']:.3f}",
        f"cores: {', '.join(f'{kind} {cores:.2f}' for kind, cores in step['cores'].items())}",
    ]
    return ", ".join(parts)


def hint_of(step: dict[str, Any], load: Load) -> str | None:
    """What to do where a window was too short for its clients; None: it was not."""
    clients, answers = step["clients"], step["answers"]
    if clients is None or answers >= clients:
        return None
    if not answers:
        return f"no answer ended in {load.duration_s:g} s; give a longer --duration"
    turn_s = math.ceil(load.duration_s * clients / answers)
    return (
        f"{answers} answers for {clients} clients: TTFT is of those who were served first. "
        f"All have a turn in about {turn_s} s; give --warmup and --duration as much for theirs"
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def summary_of(arguments: argparse.Namespace, steps: list[dict[str, Any]]) -> list[Summary]:
    """What several rounds say together of the mesh."""
    sizes = len(arguments.clients)
    if arguments.rounds == 1 or not sizes:
        return []
    goodput = [
        (step["clients"], step["goodput_tokens_per_s"])
        for step in steps
        if step["queue"] and step["clients"] is not None
    ]
    rounds = [dict(goodput[at : at + sizes]) for at in range(0, len(goodput), sizes)]
    return summaries(rounds, random.Random(0))  # noqa: S311 - the same figures give the same interval


def line_of_rounds(summary: Summary) -> str:
    """All rounds of a number of clients in one line."""
    low, high = summary.interval
    return (
        f"{summary.clients} clients, all rounds: {summary.tokens_per_s:.0f} tokens/s at the median, "
        f"deviation {summary.deviation:.0f}, {summary.share:.1%} of the highest ({low:.1%} to {high:.1%})"
    )


def report(
    arguments: argparse.Namespace, load: Load, steps: list[dict[str, Any]], rounds: list[Summary]
) -> dict[str, Any]:
    """Everything that was measured, and of what."""
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "transport": arguments.transport,
        "load": asdict(load),
        "steps": steps,
        "rounds": [asdict(one) for one in rounds],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Loads a mesh, prints a line a step, and writes what was asked for."""
    arguments = _parse(argv)
    load = Load(
        tenants=tuple(arguments.tenant or [Tenant("load")]),
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
        mixed=arguments.mixed,
        deadline_s=arguments.deadline,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
    )
    options = ("--workers", str(arguments.workers), "--gateways", str(arguments.gateways))
    try:
        with started(options) if arguments.up else nullcontext():
            bench = Bench(find(), load, arguments.transport)
            steps = asyncio.run(run(bench, arguments, load))
    except (NoMesh, subprocess.CalledProcessError) as error:
        print(f"bench load: {error}", file=sys.stderr)
        return 1
    rounds = summary_of(arguments, steps)
    for summary in rounds:
        print(line_of_rounds(summary))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(arguments, load, steps, rounds), indent=2) + "\n")
    if arguments.chart:
        draw([step for step in steps if step["clients"] is not None], arguments.chart)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="interlock bench load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--clients", type=int, nargs="+", default=[], metavar="N", help="a closed loop each")
    steps.add_argument("--rate", type=float, nargs="+", default=[], metavar="R", help="arrivals/s each")
    steps.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="all --clients steps so often (%(default)s)"
    )
    steps.add_argument("--without-queue", action="store_true", help="see above")
    steps.add_argument("--duration", type=float, default=15.0, metavar="S", help="of a step (%(default)s)")
    steps.add_argument("--warmup", type=float, default=3.0, metavar="S", help="before each (%(default)s)")
    asked = parser.add_argument_group("requests")
    asked.add_argument("--transport", choices=("grpc", "http"), default="grpc", help="(%(default)s)")
    asked.add_argument(
        "--tenant",
        type=tenant,
        action="append",
        metavar="NAME[:WEIGHT[:PRIORITY[:CLIENTS]]]",
        help="who asks; CLIENTS is its share of the clients. May be given several times (load:1)",
    )
    asked.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="(%(default)s)")
    asked.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="at most (%(default)s)")
    asked.add_argument("--mixed", action="store_true", help="answers of half to three halves of that")
    asked.add_argument("--deadline", type=float, metavar="S", help="of each request (the mesh's default)")
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--up", action="store_true", help="start one in this home, and stop it afterwards")
    mesh.add_argument("--workers", type=int, default=1, metavar="N", help="with --up (%(default)s)")
    mesh.add_argument("--gateways", type=int, default=1, metavar="N", help="with --up (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the --clients steps as PNG")
    arguments = parser.parse_args(argv)
    if not arguments.clients and not arguments.rate:
        arguments.clients = [1, 8, 16, 50, 100, 200, 400]
    if any(size <= 0 for size in (*arguments.clients, *arguments.rate, arguments.rounds)):
        parser.error("--clients, --rate and --rounds are above 0")
    if arguments.rounds > 1 and len({*arguments.clients}) < len(arguments.clients):
        parser.error("--rounds repeats each number of --clients; name each once")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
