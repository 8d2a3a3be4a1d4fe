"""Loads a mesh and tells what its clients got: goodput, latencies, refusals, missed deadlines, shares.

    interlock bench load --clients 1 16 100 --without-queue --json load.json --chart load.png
    interlock bench load --up --gateways 2 --clients 64 --tenant small:1 --tenant large:3
    interlock bench load --rate 50 --deadline 20 --transport http
    interlock bench load --up --clients 50 100 200 400 --rounds 40 --continuous --duration 3 --mixed

It loads the mesh of $INTERLOCK_HOME, or starts one there (--up). A step is a number of clients that ask
again as soon as they are answered (--clients), or a rate of independent arrivals (--rate). A client that is
refused comes back when it was told to; an arrival does not. Prompts are random token ids, no two alike.
Requests that run when a step ends are cut; their tokens count. A machine's speed drifts: --rounds runs all
--clients steps so often, mixed, and tells the medians with what they are worth; the chart draws them. With
--continuous nothing begins anew between them: clients come and go, and steps that are compared can be short
and lie close together (their TTFT is then of the steps before, too). What does not drift is told with each
step: how many streams were in a step of the workers' engines, in the mean over the time; how many cores the
workers had; and how many all others took. Tokens/s follow from the first two and the speed of the machine.

--without-queue runs every --clients step a second time as it would be with no gateway: the same clients
straight at the first worker's session, all requests at once, and whoever is refused tries again at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.load_chart import draw
from bench.load_options import add_mesh, add_requests, add_times, circumstances, load_of, mesh_of
from bench.load_plan import Load
from bench.load_rounds import Summary, order, summaries
from bench.load_runs import Bench, RunStep, run_steps
from bench.load_world import NoMesh, find


async def run(bench: Bench, arguments: argparse.Namespace, load: Load) -> list[dict[str, Any]]:
    """Runs all steps, those with and without the queue in turns, and prints each as it ends."""
    sizes = order(arguments.clients, arguments.rounds, random.Random())  # noqa: S311 - no secrets
    if arguments.continuous:
        async with bench.going_on(max(sizes)) as closed:
            return await run_steps([(closed, clients) for clients in sizes], load, continuous=True)
    plan: list[tuple[RunStep, float]] = [(bench.closed, clients) for clients in sizes]
    if arguments.without_queue:
        plan = [(way, clients) for _, clients in plan for way in (bench.closed, bench.direct)]
    plan += [(bench.open, rate) for rate in arguments.rate]
    return await run_steps(plan, load, continuous=False)


def summary_of(
    arguments: argparse.Namespace, steps: list[dict[str, Any]], measured: Callable[[dict[str, Any]], float]
) -> list[Summary]:
    """What several rounds say together of something that was measured in the mesh."""
    sizes = len(arguments.clients)
    if arguments.rounds == 1 or not sizes:
        return []
    found = [
        (step["clients"], measured(step)) for step in steps if step["queue"] and step["clients"] is not None
    ]
    rounds = [dict(found[at : at + sizes]) for at in range(0, len(found), sizes)]
    return summaries(rounds, random.Random(0))  # noqa: S311 - the same figures give the same interval


def goodput_of(step: dict[str, Any]) -> float:
    """Tokens/s."""
    return float(step["goodput_tokens_per_s"])


def worker_cores_of(step: dict[str, Any]) -> float:
    """Cores that the workers had; 0 where that is not known."""
    return float(step["cores"].get("worker", 0.0))


def engine_streams_of(step: dict[str, Any]) -> float:
    """Streams in a step of the workers' engines; 0 where that is not known."""
    return float(step["engine_streams"] or 0.0)


def line_of_rounds(goodput: Summary, streams: Summary, cores: Summary) -> str:
    """All rounds of a number of clients in one line."""
    return (
        f"{goodput.clients} clients, all rounds: {goodput.median:.0f} tokens/s at the median, "
        f"deviation {goodput.deviation:.0f}, {_share(goodput)} of the highest; "
        f"streams in a step {streams.median:.1f}, {_share(streams)}; "
        f"workers had {cores.median:.2f} cores, {_share(cores)}"
    )


# What rounds are summed up of, by its name in the report.
MEASURED = {"rounds": goodput_of, "engine_streams": engine_streams_of, "worker_cores": worker_cores_of}


def _share(summary: Summary) -> str:
    low, high = summary.interval
    return f"{summary.share:.1%} ({low:.1%} to {high:.1%})"


def report(
    arguments: argparse.Namespace,
    load: Load,
    steps: list[dict[str, Any]],
    summed: Mapping[str, list[Summary]],
) -> dict[str, Any]:
    """Everything that was measured, and of what."""
    return {
        **circumstances(arguments),
        "load": asdict(load),
        "steps": steps,
        **{name: [asdict(one) for one in found] for name, found in summed.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Loads a mesh, prints a line a step, and writes what was asked for."""
    arguments = _parse(argv)
    load = load_of(arguments)
    try:
        with mesh_of(arguments):
            bench = Bench(find(), load, arguments.transport)
            steps = asyncio.run(run(bench, arguments, load))
    except (NoMesh, subprocess.CalledProcessError) as error:
        print(f"bench load: {error}", file=sys.stderr)
        return 1
    summed = {name: summary_of(arguments, steps, measured) for name, measured in MEASURED.items()}
    for of_clients in zip(*summed.values(), strict=True):
        print(line_of_rounds(*of_clients))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(arguments, load, steps, summed), indent=2) + "\n")
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
    steps.add_argument("--continuous", action="store_true", help="see above")
    steps.add_argument("--without-queue", action="store_true", help="see above")
    add_times(steps, Load())
    add_requests(parser, Load())
    add_mesh(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the --clients steps as PNG")
    arguments = parser.parse_args(argv)
    if not arguments.clients and not arguments.rate:
        arguments.clients = [1, 8, 16, 50, 100, 200, 400]
    if any(size <= 0 for size in (*arguments.clients, *arguments.rate, arguments.rounds)):
        parser.error("--clients, --rate and --rounds are above 0")
    if arguments.rounds > 1 and len({*arguments.clients}) < len(arguments.clients):
        parser.error("--rounds repeats each number of --clients; name each once")
    if arguments.continuous and (arguments.without_queue or arguments.rate or not arguments.clients):
        parser.error("--continuous is for steps of --clients alone")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
