"""Ports of a local mesh. Owns: which ones are wanted, and the check that nobody else listens on them."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

HTTP_PORT = 8080
GATEWAY_PORT = 50051
CONTROLLER_PORT = 50052
WORKER_PORT = 50061
METRICS_PORT = 9464

# For so long the kernel keeps the port of a connection that its own end closed first.
_LET_GO_S = 61.0
_LOOK_S = 0.1
# Every socket of this network, by the kernel; other systems than Linux have no such files.
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"


class PortsTaken(Exception):
    """Ports cannot be had; the message names each, and says why and what to do."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a mesh; 0 is a free one, which its owner announces.

    Attributes:
        http: Envoy, for clients.
        gateways: One a gateway.
        controllers: One a controller.
        workers: One a worker.
        metrics: One a service, for its `/metrics`: controllers, gateways, workers; empty: free ones.
    """

    http: int
    gateways: tuple[int, ...]
    controllers: tuple[int, ...]
    workers: tuple[int, ...]
    metrics: tuple[int, ...] = ()

    def metrics_of(self, service_id: str) -> int:
        """The port of a service's metrics."""
        return dict(zip(self._service_ids(), self.metrics, strict=False)).get(service_id, 0)

    def by_user(self) -> Mapping[str, int]:
        """Every port that is fixed, by who wants it."""
        named = {"envoy": self.http}
        named |= {f"controller-{number}": port for number, port in enumerate(self.controllers, 1)}
        named |= {f"gateway-{number}": port for number, port in enumerate(self.gateways, 1)}
        named |= {f"worker-{number}": port for number, port in enumerate(self.workers, 1)}
        named |= {
            f"{service_id} metrics": port
            for service_id, port in zip(self._service_ids(), self.metrics, strict=False)
        }
        return {user: port for user, port in named.items() if port}

    def _service_ids(self) -> tuple[str, ...]:
        controllers = (f"controller-{number}" for number in range(1, len(self.controllers) + 1))
        gateways = (f"gateway-{number}" for number in range(1, len(self.gateways) + 1))
        workers = (f"worker-{number}" for number in range(1, len(self.workers) + 1))
        return (*controllers, *gateways, *workers)


def plan(http: int, *, gateways: int, workers: int, controllers: int = 1) -> Ports:
    """The ports of a mesh that clients reach at `http`; 0 makes every one a free one."""
    if http == 0:
        return Ports(0, (0,) * gateways, (0,) * controllers, (0,) * workers)
    # The controllers sit right after the first gateway; further gateways come after them.
    beside = tuple(CONTROLLER_PORT + controllers + number for number in range(gateways - 1))
    return Ports(
        http=http,
        gateways=(GATEWAY_PORT, *beside),
        controllers=tuple(CONTROLLER_PORT + number for number in range(controllers)),
        workers=tuple(WORKER_PORT + number for number in range(workers)),
        metrics=tuple(METRICS_PORT + number for number in range(controllers + gateways + workers)),
    )


def check_free(ports: Ports, tell: Callable[[str], None] = print) -> None:
    """Checks that the ports can be had, and waits for those that only a connection holds.

    Args:
        ports: The plan.
        tell: Hears of a wait.

    Raises:
        PortsTaken: Two parts want one port, somebody listens there on any address, a connection does not let
            go of it, or the machine lets nobody listen there who has no right to.
    """
    _check_distinct(ports)
    end_s = time.monotonic() + _LET_GO_S
    taken, barred = [], []
    for user, port in ports.by_user().items():
        refusal = _lasting_refusal(port, end_s, tell)
        if refusal is not None and _is_in_use(refusal):
            taken.append(f"{port} ({user})")
        elif refusal is not None:
            barred.append(f"{port} ({user}: {refusal.strerror})")
    told = []
    if taken:
        told.append(
            f"Taken: port {', '.join(taken)}. Stop what listens there (`ss -tanp` shows it; another mesh: "
            "`interlock down`), or take free ports for everything with `--port 0`."
        )
    if barred:
        told.append(
            f"Cannot be opened: port {', '.join(barred)}. Most machines keep those below 1024 for root: "
            "choose a higher `--port`, or lower `sysctl net.ipv4.ip_unprivileged_port_start`."
        )
    if told:
        raise PortsTaken(" ".join(told))


def _check_distinct(ports: Ports) -> None:
    users: dict[int, list[str]] = {}
    for user, port in ports.by_user().items():
        users.setdefault(port, []).append(user)
    doubled = [f"{port} ({' and '.join(names)})" for port, names in users.items() if len(names) > 1]
    if doubled:
        raise PortsTaken(
            f"Wanted by more than one part: port {', '.join(doubled)}. "
            "Choose another `--port`, or take free ports for everything with `--port 0`."
        )


def _lasting_refusal(port: int, end_s: float, tell: Callable[[str], None]) -> OSError | None:
    """Why nobody can listen on a port, also when no connection holds it any more; None: somebody can."""
    told = False
    # Loopback is where the mesh binds. The default ports of gateways, controllers and workers are among those
    # that the kernel gives to connections, whose far end somebody else chose: they come and go.
    while (refusal := _refusal("127.0.0.1", port)) is not None:
        if not _is_in_use(refusal) or _somebody_listens(port) or time.monotonic() > end_s:
            return refusal
        if not told:
            tell(f"Port {port} belongs to a connection; waiting for its end, for a minute at most")
            told = True
        time.sleep(_LOOK_S)
    # The wildcard finds who listens on any other address, but also connections, which harm nobody there.
    refusal = _refusal("0.0.0.0", port)  # noqa: S104 - closed at once
    if refusal is not None and _is_in_use(refusal) and not _somebody_listens(port):
        return None
    return refusal


def _is_in_use(refusal: OSError) -> bool:
    """Whether another socket is in the way, and not a rule of the machine's."""
    return refusal.errno == errno.EADDRINUSE


def _somebody_listens(port: int) -> bool:
    """Whether a socket listens on the port, on whatever address; True as well where nobody can tell."""
    tables = [table for table in _TABLES if table.exists()]
    if not tables:
        return True
    # A line is: number, local address and port, remote ones, state, all in hexadecimal digits.
    sockets = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(one[1].endswith(f":{port:04X}") and one[3] == _LISTENS for one in sockets)


def _refusal(host: str, port: int) -> OSError | None:
    """Why nobody can listen there now; None: somebody can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # SO_REUSEADDR ignores connections that a server has accepted, never a listener. SO_REUSEPORT would:
        # it stays off.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None
