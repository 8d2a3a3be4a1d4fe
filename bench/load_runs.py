"""Steps of load against one mesh. Owns: running them, and telling each in a line."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeAlias

from rich.progress import Progress

from bench.load_callers import Caller
from bench.load_direct import open_direct
from bench.load_figures import figures
from bench.load_plan import Load
from bench.load_steps import Crowd, Step, Tick
from bench.load_world import Target, engines, open_caller, processes, tokens_of

# What a cancelled request still costs its worker is over by then.
SETTLING_S = 1.0

RunStep: TypeAlias = Callable[[Any, Tick], Awaitable[dict[str, Any]]]


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

    @asynccontextmanager
    async def going_on(self, clients_max: int) -> AsyncIterator[RunStep]:
        """Steps of clients, at most so many, who stay for the next step; through the mesh."""
        opened = open_caller(
            self._target.address, self._tokens, transport=self._transport, clients=clients_max
        )
        async with opened as caller:
            crowd = self._crowd(caller)

            async def closed(clients: float, tick: Tick) -> dict[str, Any]:
                step = await crowd.go_on(int(clients), tick)
                return self._told(step, clients=int(clients), rate=None, queue=True)

            try:
                yield closed
            finally:
                await crowd.leave()

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
        return Crowd(caller, self._load, self._chance, processes, engines)

    def _told(self, step: Step, **what: Any) -> dict[str, Any]:
        found = asdict(figures(step.traces, self._load.weights, step.window_s))
        return what | found | {"cores": dict(step.cores), "engine_streams": step.streams}


async def run_steps(
    steps: Sequence[tuple[RunStep, float]], load: Load, *, continuous: bool
) -> list[dict[str, Any]]:
    """Runs steps one after the other under a progress bar; unless they go on in each other, with a pause."""
    found: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(steps) * (load.warmup_s + load.duration_s))
        for run_step, size in steps:
            progress.update(task, description=f"{run_step.__name__} {size:g}")
            told = await run_step(size, lambda seconds: progress.advance(task, seconds))
            found.append(told)
            progress.console.print(line_of(told))
            if continuous:
                continue
            if (hint := hint_of(told, load)) is not None:
                progress.console.print(f"  {hint}", style="dim")
            await asyncio.sleep(SETTLING_S)
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
        f"streams in a step {_or_dash(step['engine_streams'], '.1f')}",
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
    return _or_dash(value, ".0f")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
