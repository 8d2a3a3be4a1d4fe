"""Loads a mesh with a multiple of what it can answer, and tells what becomes of it, and afterwards.

    interlock bench overload --up
    interlock bench overload --up --factor 10 --rounds 5 --duration 60 --json overload.json

A round has three steps: clients that ask again as soon as they are answered, more of them than the workers
have slots, which is what the mesh can do; arrivals at --factor times as many requests a second as it
answered then, none of which comes back when it is refused; and the clients once more, measured from
--recovery seconds after the last arrival on. It loads the mesh of $INTERLOCK_HOME, or starts one there
(--up).

The clients' own work counts: on one machine they, the proxy and the gateways take the cores of the worker, so
how many each had is told with every step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.load_options import add_mesh, add_requests, add_times, circumstances, load_of, mesh_of
from bench.load_plan import Load
from bench.load_runs import SETTLING_S, Bench, line_of
from bench.load_world import NoMesh, find

DEFAULTS = Load(prompt_tokens=16, answer_tokens=16, deadline_s=20.0, duration_s=15.0, warmup_s=5.0)

Told = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """Three steps, as `Bench` tells of each.

    Attributes:
        before: What the mesh can do.
        flood: What becomes of a multiple of that.
        after: What it does afterwards.
    """

    before: Told
    flood: Told
    after: Told

    @property
    def kept(self) -> float:
        """Tokens/s in the flood, relative to the mean of those before and after it."""
        sides = (self.before["goodput_tokens_per_s"] + self.after["goodput_tokens_per_s"]) / 2
        return float(self.flood["goodput_tokens_per_s"] / sides) if sides else 0.0

    @property
    def recovered(self) -> float:
        """Tokens/s after the flood, relative to those before it."""
        before = self.before["goodput_tokens_per_s"]
        return float(self.after["goodput_tokens_per_s"] / before) if before else 0.0


async def run(arguments: argparse.Namespace, load: Load) -> list[Round]:
    """Runs all rounds and prints each step as it ends."""
    target = find()
    bench = Bench(target, load, arguments.transport)
    later = Bench(target, replace(load, warmup_s=arguments.recovery), arguments.transport)
    found: list[Round] = []
    with Progress(transient=True) as progress:
        seconds = 3 * load.duration_s + 2 * load.warmup_s + arguments.recovery
        task = progress.add_task("", total=arguments.rounds * seconds)

        def tick(passed_s: float) -> None:
            progress.advance(task, passed_s)

        def note(name: str, step: Told) -> Told:
            progress.console.print(f"{name}: {line_of(step)}")
            return step

        for _ in range(arguments.rounds):
            progress.update(task, description="what it can do")
            before = note("before", await bench.closed(arguments.clients, tick))
            await asyncio.sleep(SETTLING_S)
            rate = arguments.factor * max(1, before["answers"]) / load.duration_s
            progress.update(task, description=f"{rate:.0f} arrivals/s")
            flood = note("flood", await bench.open(rate, tick))
            progress.update(task, description="afterwards")
            found.append(Round(before, flood, note("after", await later.closed(arguments.clients, tick))))
            await asyncio.sleep(SETTLING_S)
    return found


def summary_of(rounds: Sequence[Round]) -> Told:
    """Medians over the rounds; None where there was nothing, as with no refusals."""
    floods = [one.flood for one in rounds]

    def median(value: Callable[[Told], float | None]) -> float | None:
        known = [found for flood in floods if (found := value(flood)) is not None]
        return statistics.median(known) if known else None

    told = [flood["refusals_with_retry_after"] for flood in floods]
    return {
        "arrivals_per_s": median(lambda flood: flood["rate"]),
        "shed_rate": median(lambda flood: flood["shed_rate"]),
        "refusal_ms_p50": median(lambda flood: flood["refusal_ms"]["p50"]),
        "refusal_ms_p95": median(lambda flood: flood["refusal_ms"]["p95"]),
        "refusals_with_retry_after": min((one for one in told if one is not None), default=None),
        "missed_deadlines": sum(flood["missed_deadlines"] for flood in floods),
        "failed": sum(step["requests"]["failed"] for one in rounds for step in asdict(one).values()),
        "goodput_kept": statistics.median(one.kept for one in rounds),
        "goodput_after": statistics.median(one.recovered for one in rounds),
    }


def line_of_summary(summary: Told) -> str:
    """All rounds in one line."""
    if summary["refusal_ms_p50"] is None:
        refused = "nobody refused"
    else:
        refused = (
            f"{summary['shed_rate']:.0%} refused after {summary['refusal_ms_p50']:.0f} ms "
            f"({summary['refusal_ms_p95']:.0f} ms at the 95th percentile), "
            f"{summary['refusals_with_retry_after']:.0%} with a time to come back"
        )
    return (
        f"all rounds, medians: {summary['arrivals_per_s']:.0f} arrivals/s, {refused}; "
        f"{summary['missed_deadlines']} missed, {summary['failed']} failed; "
        f"{summary['goodput_kept']:.0%} of the tokens/s kept, {summary['goodput_after']:.0%} afterwards"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Floods a mesh, prints a line a step and one of all, and writes what was asked for."""
    arguments = _parse(argv)
    load = load_of(arguments)
    try:
        with mesh_of(arguments):
            rounds = asyncio.run(run(arguments, load))
    except (NoMesh, subprocess.CalledProcessError) as error:
        print(f"bench overload: {error}", file=sys.stderr)
        return 1
    summary = summary_of(rounds)
    print(line_of_summary(summary))
    if arguments.json:
        told = {
            **circumstances(arguments),
            "load": asdict(load),
            "rounds": [asdict(one) for one in rounds],
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="interlock bench overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--factor", type=float, default=10.0, metavar="F", help="see above (%(default)g)")
    steps.add_argument("--clients", type=int, default=96, metavar="N", help="see above (%(default)s)")
    steps.add_argument("--recovery", type=float, default=5.0, metavar="S", help="see above (%(default)g)")
    steps.add_argument("--rounds", type=int, default=1, metavar="N", help="so often (%(default)s)")
    add_times(steps, DEFAULTS)
    add_requests(parser, DEFAULTS)
    add_mesh(parser, gateways=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    arguments = parser.parse_args(argv)
    if any(size <= 0 for size in (arguments.factor, arguments.clients, arguments.rounds)):
        parser.error("--factor, --clients and --rounds are above 0")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
