"""The mesh that is loaded. Owns: finding the one of this home or starting one, and tokens for its tenants."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from bench.load_callers import Caller, GrpcCaller
from bench.load_http import HttpCaller
from bench.load_plan import Ask, Load, Tenant
from bench.load_trace import Trace
from bench.processor_time import Processes, client_alone
from services.common.channel import connect
from services.common.tokens import mint
from services.local import state
from services.local.home import Home, SecretElsewhere

# A proxy may allow a connection only about a hundred streams; a client of many opens several.
_STREAMS_A_CHANNEL = 50
_TOKEN_TTL_S = 3_600.0


class NoMesh(Exception):
    """No mesh that can be loaded runs in this home; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """A mesh to load.

    Attributes:
        address: `host:port` for clients.
        jwt_secret: What tokens are signed with.
        worker: `host:port` of its first worker.
        workers: How many it has.
        mesh_token: What the worker believes.
        model: The name of the model.
    """

    address: str
    jwt_secret: str
    worker: str
    workers: int
    mesh_token: str
    model: str


def find() -> Target:
    """The mesh of `$INTERLOCK_HOME`.

    Raises:
        NoMesh: None runs, or none that believes what could be signed here.
    """
    home = Home.of_environment(os.environ)
    found = state.read(home.state_file)
    if found is None:
        raise NoMesh(f"No mesh runs in {home.path}. Start one with `interlock up`, or give --up.")
    address = found.http.removeprefix("http://").rstrip("/")
    worker, workers = found.workers[0].address, len(found.workers)
    try:
        jwt_secret = home.jwt_secret
    except SecretElsewhere as error:
        raise NoMesh(str(error)) from None
    return Target(address, jwt_secret, worker, workers, home.mesh_token, found.model)


def processes() -> Processes:
    """The processes of the mesh of `$INTERLOCK_HOME` as they are now, and this one."""
    found = _running()
    parts = () if found is None else found.parts()
    return (*((kind, part.pid) for kind, part in parts if part.pid), *client_alone())


def engines() -> tuple[str, ...]:
    """Where the workers of the mesh of `$INTERLOCK_HOME` tell their metrics now."""
    found = _running()
    return () if found is None else tuple(worker.metrics for worker in found.workers)


def _running() -> state.MeshState | None:
    return state.read(Home.of_environment(os.environ).state_file)


@contextmanager
def started(options: Sequence[str] = (), *, up: bool = True) -> Iterator[None]:
    """Starts a mesh in this home as `interlock up` does, on free ports, and stops it afterwards.

    Without `up` the one that runs here is left as it is.

    Raises:
        subprocess.CalledProcessError: It cannot be started, or stopped.
    """
    if not up:
        yield
        return
    command = (sys.executable, "-P", "-m", "services.cli")
    subprocess.run((*command, "up", "--detach", "--port", "0", *options), check=True)
    try:
        yield
    finally:
        subprocess.run((*command, "down"), check=True)


def tokens_of(load: Load, jwt_secret: str) -> dict[str, str]:
    """A bearer token for each tenant, with its weight."""
    return {tenant.name: _token(tenant, jwt_secret) for tenant in load.tenants}


def _token(tenant: Tenant, jwt_secret: str) -> str:
    scopes = ("generate", "priority:system") if tenant.priority == "system" else ("generate",)
    limits = {"interlock": {"weight": tenant.weight}}
    return mint(jwt_secret, subject=tenant.name, scopes=scopes, ttl_s=_TOKEN_TTL_S, extra=limits)


@asynccontextmanager
async def open_caller(
    address: str, tokens: dict[str, str], *, transport: str, clients: int
) -> AsyncIterator[Caller]:
    """Asks the gateway or the proxy at `address` by gRPC or by HTTP."""
    if transport == "http":
        yield HttpCaller(address, tokens)
        return
    async with AsyncExitStack() as exits:
        channels = [
            await exits.enter_async_context(connect(address))
            for _ in range(-(-clients // _STREAMS_A_CHANNEL))
        ]
        yield _InTurns([GrpcCaller(channel, tokens) for channel in channels])


class _InTurns:
    """Several callers, each of which gets as many requests at once as the others."""

    def __init__(self, callers: Sequence[Caller]) -> None:
        self._under_way = dict.fromkeys(callers, 0)

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        least = min(self._under_way, key=lambda caller: self._under_way[caller])
        self._under_way[least] += 1
        try:
            await least.ask(ask, trace)
        finally:
            self._under_way[least] -= 1
