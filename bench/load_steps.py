"""How load is offered: a closed loop of clients, or arrivals at a rate. Owns: who asks when."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from bench.engine_work import Engines, nobody, read, streams_between
from bench.load_callers import Caller
from bench.load_plan import Ask, Load, Tenant, ask_of
from bench.load_trace import Fate, Trace
from bench.processor_time import Listing, Usage, client_alone

# How often the progress bar moves.
_TICK_S = 0.25
# A failure without a delay must not become a storm of connections.
_FAILURE_PAUSE_S = 0.1

Tick = Callable[[float], None]


@dataclass(slots=True)
class Step:
    """What one step of load left behind.

    Attributes:
        traces: All its requests.
        window_s: From when to when it is measured, of the traces' clock.
        cores: Cores that each kind of process kept busy then.
        streams: How many the workers' engines carried then; None: they were not asked.
    """

    traces: list[Trace] = field(default_factory=list)
    window_s: tuple[float, float] = (0.0, 0.0)
    cores: Mapping[str, float] = field(default_factory=dict)
    streams: float | None = None


@dataclass(slots=True, eq=False)
class _Client:
    """One of a closed loop.

    Attributes:
        tenant: Who asks.
        trace: What it asks for now.
    """

    tenant: Tenant
    trace: Trace | None = None

    @property
    def waits(self) -> bool:
        """Whether no worker is at its request."""
        return self.trace is None or self.trace.started_s is None


class Crowd:
    """Those who ask.

    Args:
        caller: How they ask.
        load: What they ask.
        chance: Draws prompts and arrivals.
        processes: Tells which processes there are now, the mesh's and this one.
        engines: Tells where the workers' metrics are now.
    """

    def __init__(
        self,
        caller: Caller,
        load: Load,
        chance: random.Random,
        processes: Listing = client_alone,
        engines: Engines = nobody,
    ) -> None:
        self._caller, self._load, self._chance = caller, load, chance
        self._processes, self._engines = processes, engines
        # Each with its asking.
        self._clients: dict[_Client, asyncio.Task[None]] = {}
        self._traces: list[Trace] = []

    async def closed_loop(self, clients: int, tick: Tick) -> Step:
        """So many clients, each of which asks again as soon as it is answered."""
        try:
            return await self.go_on(clients, tick)
        finally:
            await self.leave()

    async def go_on(self, clients: int, tick: Tick) -> Step:
        """The same, but those of the step before stay, and those of this one will.

        Nothing begins anew: where there were fewer, more come, and where there were more, as many leave, of
        those whose requests wait first.
        """
        self._traces = [client.trace for client in self._clients if client.trace is not None]
        await self._resize(Counter(self._load.crowd(clients)))
        step = await self._measure(tick)
        for asking in self._clients.values():
            if asking.done():
                # A defect of the bench: a client goes on for ever.
                asking.result()
        return step

    async def leave(self) -> None:
        """All clients leave."""
        await self._resize(Counter())

    async def _resize(self, wanted: Counter[Tenant]) -> None:
        leaving: list[_Client] = []
        for tenant in self._load.tenants:
            of_tenant = [client for client in self._clients if client.tenant == tenant]
            of_tenant.sort(key=lambda client: client.waits)
            leaving += of_tenant[wanted[tenant] :]
            for _ in range(wanted[tenant] - len(of_tenant)):
                client = _Client(tenant)
                self._clients[client] = asyncio.create_task(self._keep_asking(client))
        tasks = [self._clients.pop(client) for client in leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def open_loop(self, rate: float, tick: Tick) -> Step:
        """Arrivals at `rate` a second, one independent of the other; nobody who is refused comes again."""
        tasks: list[asyncio.Task[None]] = []
        async with _ended(tasks):
            tasks.append(asyncio.create_task(self._arrive(rate, tasks)))
            return await self._measure(tick)

    async def _measure(self, tick: Tick) -> Step:
        began_s = time.monotonic() + self._load.warmup_s
        until_s = began_s + self._load.duration_s
        await self._pass_until(began_s, tick)
        usage, before = Usage(self._processes()), await read(self._engines())
        await self._pass_until(until_s, tick)
        cores, after = usage.cores(), await read(self._engines())
        return Step(self._traces, (began_s, until_s), cores, streams_between(before, after))

    async def _pass_until(self, until_s: float, tick: Tick) -> None:
        while (left_s := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(_TICK_S, left_s))
            tick(min(_TICK_S, left_s))

    async def _keep_asking(self, client: _Client) -> None:
        wished_s, ask = time.monotonic(), ask_of(self._load, client.tenant, self._chance)
        while True:
            client.trace = trace = self._begin(ask, wished_s)
            await self._caller.ask(ask, trace)
            if trace.fate is not Fate.REFUSED:
                wished_s, ask = time.monotonic(), ask_of(self._load, client.tenant, self._chance)
            pause_s = _FAILURE_PAUSE_S if trace.fate is Fate.FAILED else trace.retry_after_s
            if pause_s is not None:
                await asyncio.sleep(pause_s)

    async def _arrive(self, rate: float, tasks: list[asyncio.Task[None]]) -> None:
        tenants = self._load.tenants
        shares = [tenant.clients for tenant in tenants]
        due_s = time.monotonic()
        while True:
            # Due times do not depend on how late this loop runs.
            due_s += self._chance.expovariate(rate)
            await asyncio.sleep(due_s - time.monotonic())
            (tenant,) = self._chance.choices(tenants, shares)
            tasks.append(asyncio.create_task(self._visitor(tenant)))

    async def _visitor(self, tenant: Tenant) -> None:
        ask = ask_of(self._load, tenant, self._chance)
        await self._caller.ask(ask, self._begin(ask, time.monotonic()))

    def _begin(self, ask: Ask, wished_s: float) -> Trace:
        trace = Trace(ask.tenant.name, wished_s, time.monotonic(), ask.deadline_s)
        self._traces.append(trace)
        return trace


@asynccontextmanager
async def _ended(tasks: list[asyncio.Task[None]]) -> AsyncIterator[None]:
    """Ends all tasks at the end; a failure of one of them, a defect of the bench, is raised."""
    try:
        yield
    finally:
        broken = [task for task in tasks if task.done() and not task.cancelled() and task.exception()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in broken:
        task.result()
