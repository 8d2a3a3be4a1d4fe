"""Several gateways and controllers behind one Envoy: who gets calls, who does not, and how Envoy leaves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.envoy import generate
from deploy.envoy.clusters import WATCHES_MAX
from deploy.envoy.parameters import Endpoint, Parameters
from deploy.envoy.routes import MESSAGE_BYTES_MAX
from tests.fixtures.edge import Edge, ask, started_edge

WATCH = "/grpc.health.v1.Health/Watch"
GENERATE = "/interlock.v1.GatewayService/Generate"
WORKERS = "/v1/admin/workers"
DRAIN = generate.DESCRIPTORS.with_name("drain.sh")
DRAINED = DRAIN.with_name("drained.sh")


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    """Three gateways and two controllers, with a probe and an admin port."""
    parameters = Parameters(
        admin=Endpoint("127.0.0.1", 0), probe=Endpoint("127.0.0.1", 0), connections_max=20
    )
    with started_edge(tmp_path, parameters, gateways=3, controllers=2) as edge:
        yield edge


def _await(holds: Callable[[], bool], what: str, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _equal(look: Callable[[], object], expected: object) -> bool:
    return look() == expected


def _serves(edge: Edge) -> bool:
    """Whether as many calls as that are answered, one after the other."""
    try:
        return {edge.call(GENERATE) for _ in range(20)} == {b"x"}
    except grpc.RpcError:
        return False


def _unread_gets(path: str, streams: int) -> bytes:
    """HTTP/2 by hand: a client that asks so often, and has room for not one byte of any answer."""
    no_room = b"\x00\x04" + bytes(4)
    frames = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _frame(4, 0, 0, no_room)]
    # GET and http by their places in the table, path and host as they are.
    named = b"".join(
        place + bytes([len(text)]) + text for place, text in ((b"\x04", path.encode()), (b"\x01", b"x"))
    )
    frames += [_frame(1, 0x5, 2 * number + 1, b"\x82\x86" + named) for number in range(streams)]
    return b"".join(frames)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _who(edge: Edge, count: int = 24) -> set[bytes]:
    """Who answers that many requests."""
    return {edge.ask("POST", "/v1/generate", "x")[2].split()[0] for _ in range(count)}


def _probe(edge: Edge) -> str:
    listed = ask(edge.admin, "GET", "/listeners")[2].decode()
    return next(line.partition("::")[2] for line in listed.splitlines() if line.startswith("probe::"))


def test_calls_are_spread_and_a_draining_gateway_gets_none(edge: Edge) -> None:
    """All three serve; from the second in which one says NOT_SERVING the other two have every call."""
    assert _who(edge) == {b"gateway", b"gateway1", b"gateway2"}
    edge.gateways[1].set_serving(serving=False)
    _await(lambda: edge.stat("cluster.gateways.membership_healthy") == 2, "it stays healthy")
    assert _who(edge) == {b"gateway", b"gateway2"}
    edge.gateways[1].set_serving(serving=True)
    _await(lambda: len(_who(edge)) == 3, "it does not come back")


def test_a_dead_gateway_costs_no_call(edge: Edge) -> None:
    """From its death on every new call succeeds at another one: what found no connection is sent again."""
    assert len(_who(edge)) == 3
    edge.gateways[2].stop()
    for _ in range(60):
        status, _, body = edge.ask("POST", "/v1/generate", "x")
        assert (status, body.split()[0] in {b"gateway", b"gateway1"}) == (200, True)
    _await(lambda: edge.stat("cluster.gateways.membership_healthy") == 2, "the dead one stays healthy")


def test_admin_calls_go_to_the_controller_that_leads(edge: Edge) -> None:
    """The standby says NOT_SERVING and gets nothing; when the leadership moves, so do the calls."""

    def answering() -> set[bytes]:
        return {edge.ask("GET", WORKERS)[2] for _ in range(10)}

    for leader, expected in ((0, {b"controller 0"}), (1, {b"controller1 0"}), (0, {b"controller 0"})):
        for number in (0, 1):
            edge.controllers[number].set_serving(serving=number == leader)
        _await(partial(_equal, answering, expected), "the standby answers")
        assert answering() == expected


def test_a_name_leads_to_every_address_that_it_has(tmp_path: Path) -> None:
    """As in Kubernetes: the clusters follow DNS, and a call arrives."""
    parameters = Parameters(admin=Endpoint("127.0.0.1", 0))
    with started_edge(tmp_path, parameters, by_name=True) as edge:
        _await(lambda: edge.ask("POST", "/v1/generate", "x")[2] == b"gateway 1", "nothing was resolved")
        assert b"::127.0.0.1:" in ask(edge.admin, "GET", "/clusters")[2]


def test_a_connection_carries_1024_streams(edge: Edge) -> None:
    """Four hundred clients may share one channel; what Envoy allows stands in its settings."""
    held = threading.Event()
    edge.gateway.hold = edge.gateways[1].hold = edge.gateways[2].hold = held
    with grpc.insecure_channel(edge.address) as channel:
        begin: Any = channel.unary_unary(GENERATE)
        calls = [begin.future(b"x", timeout=20) for _ in range(400)]
        _await(lambda: edge.stat("http.interlock.downstream_rq_active") >= 400, "streams wait for each other")
        assert edge.stat("http.interlock.downstream_cx_active") == 1
        held.set()
        assert {call.result() for call in calls} == {b"x"}


def test_watches_of_health_have_a_bound_of_their_own(edge: Edge) -> None:
    """Whoever holds as many open as Envoy takes, without a token, keeps others from watching, and no more."""
    watching = "cluster.gateways.circuit_breakers.high.remaining_rq"
    with grpc.insecure_channel(edge.address) as channel:
        watch: Any = channel.unary_stream(WATCH)
        watches = [watch(b"") for _ in range(WATCHES_MAX)]
        assert {next(one) for one in watches} == {b"\x08\x01"}
        assert edge.stat(watching) == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(watch(b""))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert edge.call(GENERATE) == b"x"
        watches[0].cancel()
        _await(lambda: edge.stat(watching) == 1, "a place is never free again")
        assert next(watch(b"")) == b"\x08\x01"


def test_who_reads_no_large_document_keeps_no_request_out(edge: Edge) -> None:
    """`/openapi.json` needs no token; Envoy keeps the call of a client that lets none of it in, apart."""
    for gateway in edge.gateways:
        gateway.large = 100_000
    host, _, port = edge.address.rpartition(":")
    apart = "cluster.gateways.circuit_breakers.high.remaining_rq"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(_unread_gets("/openapi.json", streams=20))
        _await(lambda: edge.stat(apart) == WATCHES_MAX - 20, "they are not kept apart")
        assert edge.call(GENERATE) == b"x"
    _await(lambda: edge.stat(apart) == WATCHES_MAX, "they are never free again")


def test_a_request_that_never_comes_asks_no_gateway(edge: Edge) -> None:
    """Headers alone, by HTTP and by gRPC, hold nothing at a gateway; what has come whole is answered."""
    host, _, port = edge.address.rpartition(":")
    come = threading.Event()

    def late() -> Iterator[bytes]:
        come.wait()
        yield b"x"

    with socket.create_connection((host, int(port))) as half, grpc.insecure_channel(edge.address) as channel:
        half.sendall(b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf")
        begin: Any = channel.stream_unary(GENERATE)
        call = begin.future(late(), timeout=20)
        _await(lambda: edge.stat("http.interlock.downstream_rq_active") == 2, "they are not both in")
        assert edge.call(GENERATE) == b"x"
        assert edge.stat("cluster.gateways.upstream_rq_total") == 1
        come.set()
        assert call.result() == b"x"


def test_who_keeps_back_the_ends_of_large_messages_goes_before_others_are_refused(tmp_path: Path) -> None:
    """Envoy keeps what has come of each, until they take most of its memory; then it resets the largest."""
    parameters = Parameters(admin=Endpoint("127.0.0.1", 0), heap_bytes_max=96 << 20)
    over = threading.Event()

    def most() -> Iterator[bytes]:
        yield bytes(MESSAGE_BYTES_MAX - 1)
        over.wait()

    with started_edge(tmp_path, parameters) as edge, grpc.insecure_channel(edge.address) as channel:
        begin: Any = channel.stream_unary(GENERATE)
        calls = [begin.future(most(), timeout=30) for _ in range(32)]
        _await(lambda: any(call.done() for call in calls), "everything is kept")
        _await(partial(_serves, edge), "it refuses everybody")
        over.set()
        for call in calls:
            call.cancel()


def test_a_deadline_in_a_stream_that_has_begun_is_told_as_one(edge: Edge) -> None:
    """Envoy keeps no timer of its own, which would reset the stream as INTERNAL before the client's ends."""
    for gateway in edge.gateways:
        gateway.hold, gateway.begins = threading.Event(), True
    with grpc.insecure_channel(edge.address) as channel:
        begin: Any = channel.unary_stream(GENERATE)
        streams = [begin(b"x", timeout=0.3) for _ in range(40)]
        codes = [stream.code() for stream in streams]
    assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}


def test_rapid_resets_end_the_connection(edge: Edge) -> None:
    """Who opens and resets hundreds of streams at once loses the connection; the next client is served."""
    held = threading.Event()
    for gateway in edge.gateways:
        gateway.hold = held
    closed = "http.interlock.downstream_rq_too_many_premature_resets"

    async def abuse() -> bool:
        async with grpc.aio.insecure_channel(edge.address) as channel:
            begin: Any = channel.unary_unary(GENERATE)
            # Ten rounds are enough; on a busy machine some streams are withdrawn before they were sent.
            for _ in range(60):
                calls = [begin(b"x") for _ in range(60)]
                await asyncio.sleep(0.03)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                if await asyncio.to_thread(edge.stat, closed):
                    return True
        return False

    assert asyncio.run(abuse()), "the connection goes on"
    held.set()
    for gateway in edge.gateways:
        gateway.hold = None
    assert edge.ask("POST", "/v1/generate", "x")[0] == 200


def test_connections_have_a_bound_that_probes_do_not_feel(edge: Edge) -> None:
    """Beyond the bound a connection is closed at once; readiness and the admin interface still answer."""
    host, port = edge.address.split(":")
    held = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
    try:
        _await(lambda: edge.stat("http.interlock.downstream_cx_active") == 20, "they are not all in")
        with pytest.raises((ConnectionError, OSError)):
            edge.ask("POST", "/v1/generate", "x")
        assert ask(_probe(edge), "GET", "/ready")[0] == 200
    finally:
        for sock in held:
            sock.close()
    _await(lambda: edge.stat("http.interlock.downstream_cx_active") == 0, "they are never let go")
    assert edge.ask("POST", "/v1/generate", "x")[0] == 200


def test_draining_says_so_first_and_lets_streams_end(edge: Edge) -> None:
    """`drain.sh`: the probe turns, a running call finishes, and the script returns when it has."""
    assert ask(_probe(edge), "GET", "/ready")[0] == 200
    assert ask(_probe(edge), "GET", "/stats")[0] == 404
    held = threading.Event()
    for gateway in edge.gateways:
        gateway.hold = held
    port = edge.admin.rpartition(":")[2]
    with grpc.insecure_channel(edge.address) as channel:
        begin: Any = channel.unary_unary(GENERATE)
        running = begin.future(b"x", timeout=20)
        _await(lambda: edge.stat("http.interlock.downstream_rq_active") == 1, "the call does not arrive")
        with subprocess.Popen([str(DRAIN), port, "20", "0"]) as script:
            _await(lambda: ask(_probe(edge), "GET", "/ready")[0] == 503, "it still says that it is ready")
            assert script.poll() is None
            held.set()
            assert running.result() == b"x"
            assert script.wait(10) == 0


def test_draining_does_not_wait_for_ever(edge: Edge) -> None:
    """A call that outlasts the time makes the script return 1: whoever asked then ends Envoy."""
    held = threading.Event()
    for gateway in edge.gateways:
        gateway.hold = held
    with grpc.insecure_channel(edge.address) as channel:
        begin: Any = channel.unary_unary(GENERATE)
        running = begin.future(b"x", timeout=20)
        _await(lambda: edge.stat("http.interlock.downstream_rq_active") == 1, "the call does not arrive")
        command = [str(DRAIN), edge.admin.rpartition(":")[2], "1", "0"]
        assert subprocess.run(command, check=False, timeout=10).returncode == 1
        held.set()
        assert running.result() == b"x"


def _answer_one_active(connection: socket.socket) -> None:
    """Answers the admin interface's client that one call runs."""
    with connection, connection.makefile("rb") as asked:
        # Read to its end: else the client would find the connection reset.
        while asked.readline().strip():
            pass
        connection.sendall(b"http.interlock.downstream_rq_active: 1\n")


@contextlib.contextmanager
def _admin(answers: int) -> Iterator[int]:
    """An admin interface that answers a few times, and is mute then: its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    connection, _ = server.accept()
                    held.append(connection)
                    if number < answers:
                        _answer_one_active(connection)

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            serving.join()
            for connection in held:
                connection.close()


def test_draining_keeps_its_time_with_an_envoy_that_grows_mute() -> None:
    """It may be busy with the streams that are to end, so they get their time, and no more."""
    with _admin(answers=3) as port:
        script = subprocess.run([str(DRAIN), str(port), "1", "0"], check=False, timeout=20)
    assert script.returncode == 1


def test_draining_ends_with_its_envoy(free_tcp_port: int) -> None:
    """One that dies meanwhile has no streams, so nobody waits for their end."""
    command = [str(DRAIN), str(free_tcp_port), "40", "0"]
    server = socket.create_server(("127.0.0.1", free_tcp_port))
    server.settimeout(20)
    with server, subprocess.Popen(command, stderr=subprocess.DEVNULL) as script:
        for _ in range(3):
            _answer_one_active(server.accept()[0])
        server.close()
        assert script.wait(20) == 1


def test_an_envoy_that_is_told_to_end_drains_first(tmp_path: Path, free_tcp_port: int) -> None:
    """`drained.sh`: on SIGTERM the probe turns, a running call finishes, and then Envoy ends."""
    parameters = Parameters(admin=Endpoint("127.0.0.1", free_tcp_port), probe=Endpoint("127.0.0.1", 0))
    through = (str(DRAINED), str(free_tcp_port), "20", "0")
    with (
        started_edge(tmp_path, parameters, through=through) as edge,
        grpc.insecure_channel(edge.address) as channel,
    ):
        held = edge.gateway.hold = threading.Event()
        probe = _probe(edge)
        begin: Any = channel.unary_unary(GENERATE)
        running = begin.future(b"x", timeout=20)
        try:
            _await(lambda: edge.stat("http.interlock.downstream_rq_active") == 1, "the call does not arrive")
            edge.process.terminate()
            _await(lambda: ask(probe, "GET", "/ready")[0] == 503, "it still says that it is ready")
            assert edge.process.poll() is None
        finally:
            held.set()
        assert running.result() == b"x"
        assert edge.process.wait(10) == 0


def test_what_drains_ends_as_what_it_runs(free_tcp_port: int) -> None:
    """So a container ends with its Envoy; one that does not listen yet has nothing to drain."""
    command = [str(DRAINED), str(free_tcp_port), "20", "0", "sh", "-c"]
    assert subprocess.run([*command, "exit 3"], check=False, timeout=10).returncode == 3
    with subprocess.Popen([*command, "echo begun; exec sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
