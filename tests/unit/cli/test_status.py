"""`interlock status`: what it shows of processes and of what the controller says, and how it exits."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator

import pytest
from interlock.v1.worker_pb2 import (
    WORKER_STATE_DRAINING,
    WORKER_STATE_LOST,
    WORKER_STATE_PREPARING,
    WORKER_STATE_SERVING,
    WorkerState,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from services.cli.__main__ import main
from services.cli.status_watch import look
from services.common.metrics import expose
from services.local import state
from tests.fakes.cli_mesh import FakeMesh
from tests.fixtures.proxy import name_a_dead_proxy

Capture = pytest.CaptureFixture[str]


def test_status_shows_every_process(mesh: FakeMesh, capsys: Capture) -> None:
    """One line a process with kind, id, state, address and pid; the same as JSON."""
    assert main(["status"]) == 0
    assert "gateway-1" in capsys.readouterr().out
    assert main(["status", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["redis", "gateway", "envoy", "breaker"]
    assert [row["state"] for row in rows] == ["running", "running", "running", "open"]
    assert rows[-1]["id"] == "gateway-1/worker-1"
    assert mesh.requests == []


@pytest.mark.parametrize(
    ("told", "shown", "code"),
    [
        (WORKER_STATE_SERVING, "running", 0),
        (WORKER_STATE_DRAINING, "draining", 0),
        (WORKER_STATE_PREPARING, "preparing", 1),
        (WORKER_STATE_LOST, "lost", 1),
    ],
)
def test_status_says_how_workers_are_to_the_controller(
    told: WorkerState.ValueType,
    shown: str,
    code: int,
    mesh: FakeMesh,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that stands still listens all the same, and so does one that the controller has forgotten."""
    found = state.read(mesh.home.state_file)
    assert found is not None
    workers = tuple(dataclasses.replace(found.envoy, id=name) for name in ("worker-1", "worker-2"))
    state.write(mesh.home.state_file, dataclasses.replace(found, workers=workers[:1]))
    mesh.worker_state = told
    assert main(["status", "--json"]) == code
    states = {row["id"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states["worker-1"] == shown
    watched(as_json=True, monkeypatch=monkeypatch)
    seen = json.loads(capsys.readouterr().out)
    assert shown in {row["state"] for row in seen["processes"] if row["id"] == "worker-1"}
    state.write(mesh.home.state_file, dataclasses.replace(found, workers=workers))
    assert main(["status", "--json"]) == 1
    states = {row["id"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert (states["worker-1"], states["worker-2"]) == (shown, "unattached")


def test_status_needs_no_controller(mesh: FakeMesh, capsys: Capture) -> None:
    """What cannot be asked for changes nothing: the processes are told as they are seen."""
    found = state.read(mesh.home.state_file)
    assert found is not None
    worker = dataclasses.replace(found.envoy, id="worker-1")
    # Nothing listens there.
    nowhere = dataclasses.replace(found, workers=(worker,), http="http://127.0.0.1:1")
    state.write(mesh.home.state_file, nowhere)
    mesh.worker_state = WORKER_STATE_LOST
    assert main(["status", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["id"]: row["state"] for row in rows}["worker-1"] == "running"


def watched(*, as_json: bool, monkeypatch: pytest.MonkeyPatch, looks: int = 1) -> None:
    """`status --watch`, ended by Ctrl-C after so many looks."""
    left = iter(range(looks - 1))

    async def interrupted(_: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "sleep", interrupted)
    assert main(["status", "--watch", *(["--json"] if as_json else [])]) == 0


def test_status_can_be_watched(mesh: FakeMesh, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes, the queue, routes, workers and breakers; what cannot be asked is told as not known."""
    assert mesh.requests == []
    with monkeypatch.context() as terminal:
        terminal.setenv("TTY_COMPATIBLE", "1")
        watched(as_json=False, monkeypatch=monkeypatch)
        drawn = capsys.readouterr().out
    # In a pipe each look is a picture of its own, printed when it was taken.
    watched(as_json=False, monkeypatch=monkeypatch, looks=2)
    shown = capsys.readouterr().out
    assert shown.count("tiny@r1 active") == 2
    for words in ("gateway-1", "tiny@r1 active", "int8", "open", "? requests"):
        assert words in shown, shown
        assert words in drawn, drawn
    watched(as_json=True, monkeypatch=monkeypatch)
    (line,) = capsys.readouterr().out.splitlines()
    seen = json.loads(line)
    assert set(seen) == {"processes", "queue", "models", "workers", "breakers"}
    # This mesh's gateway has no numbers to ask for.
    assert seen["queue"] == {"requests": None, "waiting": None}
    assert [worker["id"] for worker in seen["workers"]] == ["worker-1"]


def test_status_fails_when_a_process_is_gone(mesh: FakeMesh, capsys: Capture) -> None:
    """A process that does not exist is restarting, and the exit code says that not all is well."""
    file = mesh.home.state_file
    found = state.read(file)
    assert found is not None
    state.write(file, found.with_pid("gateway-1", 2**22 + 1))
    assert main(["status", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    states = {row["id"]: row["state"] for row in rows if row["kind"] != "breaker"}
    assert states == {"redis": "running", "gateway-1": "restarting", "envoy": "running"}


class Live:
    """A gateway's number of requests, as its metrics have it."""

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        yield GaugeMetricFamily("interlock_gateway_live", "Requests that have not ended.", 3)


async def test_requests_are_counted_without_a_proxy(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment names for the rest of the world does not know this machine's gateways."""
    name_a_dead_proxy(monkeypatch)
    found = state.read(mesh.home.state_file)
    assert found is not None
    shown = expose("127.0.0.1:0", Live())
    try:
        part = dataclasses.replace(found.gateways[0], metrics=shown.address)
        seen = await look(mesh.home, dataclasses.replace(found, gateways=(part, part)), lambda _: [])
    finally:
        shown.close()
    assert seen["queue"] == {"requests": 6, "waiting": 4}
