"""Ports of a local mesh. Owns: which ones are wanted, and the check that nobody else listens on them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

HTTP_PORT = 8080
GATEWAY_PORT = 50051
CONTROLLER_PORT = 50052
WORKER_PORT = 50061
METRICS_PORT = 9464


class PortsTaken(Exception):
    """Somebody else listens; the message names every taken port and says what to do."""


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


def check_free(ports: Ports) -> None:
    """Raises PortsTaken for a port that two parts want, or where somebody listens on any address."""
    _check_distinct(ports)
    taken = {user: port for user, port in ports.by_user().items() if not _is_free(port)}
    if not taken:
        return
    names = ", ".join(f"{port} ({user})" for user, port in taken.items())
    raise PortsTaken(
        f"Taken: port {names}. Stop what listens there (`ss -ltnp` shows it; another mesh: "
        "`interlock down`), or take free ports for everything with `--port 0`."
    )


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


def _is_free(port: int) -> bool:
    # Loopback finds who listens there, the wildcard who listens on any other address of the machine.
    return all(_can_listen(host, port) for host in ("127.0.0.1", "0.0.0.0"))  # noqa: S104 - closed at once


def _can_listen(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # SO_REUSEADDR ignores connections that are over, never a listener. SO_REUSEPORT would: it stays off.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
