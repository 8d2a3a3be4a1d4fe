"""Ports: who wants which, and that a taken one is named."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.local import ports


@contextmanager
def _listener(host: str, *, reuse_port: bool = False) -> Iterator[int]:
    with socket.socket() as taken:
        if reuse_port:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((host, 0))
        taken.listen(1)
        yield taken.getsockname()[1]


def test_the_defaults_are_the_documented_ports() -> None:
    """8080 for Envoy, gateways around the controller's 50052, workers from 50061, metrics from 9464."""
    planned = ports.plan(8080, gateways=3, workers=2, controllers=2)
    metrics = tuple(range(9464, 9471))
    assert planned == ports.Ports(8080, (50051, 50054, 50055), (50052, 50053), (50061, 50062), metrics)
    assert planned.metrics_of("gateway-1") == 9466
    assert planned.by_user()["worker-2 metrics"] == 9470
    assert len(set(planned.by_user().values())) == len(planned.by_user())


def test_port_0_frees_every_port() -> None:
    """No port is fixed, so nothing can be taken."""
    planned = ports.plan(0, gateways=2, workers=2)
    assert planned.by_user() == {}
    ports.check_free(planned)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.7"])  # noqa: S104 - a test's listener
@pytest.mark.parametrize("reuse_port", [False, True])
def test_a_taken_port_is_named(host: str, reuse_port: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """A listener is found on whatever address, also one that shares its port with whoever asks so."""
    with _listener(host, reuse_port=reuse_port) as port:
        wanted = ports.Ports(port, (0,), (0,), (0,))
        with pytest.raises(ports.PortsTaken, match=rf"{port} \(envoy\).*--port 0"):
            ports.check_free(wanted)


def test_every_taken_port_is_named_at_once() -> None:
    """Whoever frees ports wants the whole list."""
    with _listener("127.0.0.1") as first, _listener("127.0.0.1") as second:
        wanted = ports.Ports(0, (first,), (0,), (second,))
        with pytest.raises(ports.PortsTaken) as caught:
            ports.check_free(wanted)
    assert f"{first} (gateway-1)" in str(caught.value)
    assert f"{second} (worker-1)" in str(caught.value)


@pytest.mark.parametrize(
    ("planned", "words"),
    [
        (ports.plan(8080, gateways=10, workers=1), r"50061 \(gateway-10 and worker-1\)"),
        (ports.plan(50051, gateways=1, workers=1), r"50051 \(envoy and gateway-1\)"),
    ],
)
def test_a_port_that_two_parts_want_is_named(planned: ports.Ports, words: str) -> None:
    """The plan itself is refused, before anybody binds anything."""
    with pytest.raises(ports.PortsTaken, match=words):
        ports.check_free(planned)


def test_a_closed_connection_does_not_hold_its_port() -> None:
    """A port whose last connection the server closed may be bound again at once."""
    with socket.socket() as server:
        # As every server of the mesh does.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            # The side that closes first keeps the port in TIME_WAIT.
            accepted.close()
            client.recv(1)
    ports.check_free(ports.Ports(port, (), (), ()))


@contextmanager
def _connection(host: str) -> Iterator[socket.socket]:
    """A connection to somebody's server, whose own end is at a port that nobody chose."""
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.bind((host, 0))
        client.connect(server.getsockname())
        # Closed, it is gone at once, without a time in which its port is kept.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        yield client


def test_a_connection_from_another_address_does_not_take_the_port() -> None:
    """The mesh binds loopback alone, where it can."""
    waits: list[str] = []
    with _connection("127.0.0.7") as client:
        ports.check_free(ports.Ports(client.getsockname()[1], (), (), ()), waits.append)
    assert not waits


def test_a_connection_is_waited_for() -> None:
    """A program that looks something up has a port of ours by chance: it is told, and lets go of it soon."""
    waits: list[str] = []
    with _connection("127.0.0.1") as client:
        port = client.getsockname()[1]

        def tell(text: str) -> None:
            waits.append(text)
            client.close()

        ports.check_free(ports.Ports(port, (), (), ()), tell)
    (told,) = waits
    assert f"Port {port} belongs to a connection" in told


def test_a_port_that_may_not_be_bound_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 80 is root's on most machines: nobody goes away there, and there is nobody to stop."""
    waits: list[str] = []
    monkeypatch.setattr(socket.socket, "bind", _denied)
    with pytest.raises(ports.PortsTaken, match=r"80 \(envoy: Permission denied\).*--port") as caught:
        ports.check_free(ports.Ports(80, (), (), ()), waits.append)
    assert not waits
    assert "Taken" not in str(caught.value)
    assert "Stop" not in str(caught.value)


def _denied(_: socket.socket, address: tuple[str, int]) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(address))


def test_a_connection_that_stays_is_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can bind its port: who wants it is named."""
    monkeypatch.setattr(ports, "_LET_GO_S", 0.0)
    with _connection("127.0.0.1") as client, pytest.raises(ports.PortsTaken, match=r"\(envoy\)"):
        ports.check_free(ports.Ports(client.getsockname()[1], (), (), ()), lambda _: None)
