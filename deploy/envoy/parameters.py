"""The parameters of one Envoy configuration. Owns: their names, defaults and bounds."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

# Pages served by a developer's own machine; a deployment names its origins.
LOCAL_ORIGINS = (r"https?://(localhost|127\.0\.0\.1)(:\d{1,5})?",)

PORT_MAX = 65_535
ADMIN_PORT = 9901

# A machine allows 1,024 descriptors a process by default; upstream, logs and admin need some.
CONNECTIONS_MAX = 900
# Envoy rests at 40 MiB; 900 connections with full windows stay below this.
HEAP_BYTES_MAX = 1_073_741_824
# What Envoy rests at, twice: below it every request would be refused.
_HEAP_BYTES_MIN = 80 << 20


class ParameterInvalid(ValueError):
    """A parameter cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one process listens.

    Attributes:
        host: An IP address; upstream also a DNS name, whose addresses are all endpoints.
        port: 0 (a free one, for Envoy's own ports alone) to 65535.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Reads `host:port`; an IPv6 host stands in brackets.

        Raises:
            ParameterInvalid: It is not of that form.
        """
        host, separator, port = text.rpartition(":")
        if not separator or not host or not port.isdecimal() or int(port) > PORT_MAX:
            raise ParameterInvalid(f"{text!r} is not host:port, such as 127.0.0.1:50051.")
        return cls(host.strip("[]"), int(port))

    @property
    def is_name(self) -> bool:
        """Whether the host must be resolved."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return True
        return False

    def __str__(self) -> str:
        """`host:port`, as `parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where Envoy finds what it proves itself with.

    Attributes:
        secret: The SDS file that names the two; written beside the configuration.
        directory: Holds `tls.crt` and `tls.key`, as in a Kubernetes secret. Envoy watches it.
    """

    secret: str
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One configuration. The defaults are those of a mesh on one machine.

    Attributes:
        listen: Where clients connect. Loopback unless somebody decides otherwise.
        admin: Envoy's admin interface: loopback, or a Unix socket's path, for it can stop Envoy.
        probe: Where an orchestrator asks whether Envoy takes calls; None: nowhere.
        gateways: Every gateway process; Envoy keeps about one connection a thread to each.
        controllers: Every controller, for admin calls; the one that leads is healthy.
        descriptors: The descriptor set of `interlock.http.v1`, as Envoy opens it.
        certificate: What to serve TLS with; None: plain text.
        cors_origins: Regular expressions of the web origins whose pages may call.
        access_log: File of the access log; None writes it to standard output.
        instance: This Envoy's name in the access log; `%ENVIRONMENT(NAME)%` reads a variable.
        connections_max: Most connections of clients.
        heap_bytes_max: Most bytes of memory; near it requests are refused.
    """

    listen: Endpoint = Endpoint("127.0.0.1", 8080)
    admin: Endpoint | Path = Endpoint("127.0.0.1", ADMIN_PORT)
    probe: Endpoint | None = None
    gateways: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", 50051),)
    controllers: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", 50052),)
    descriptors: str = "deploy/envoy/interlock.binpb"
    certificate: Certificate | None = None
    cors_origins: tuple[str, ...] = LOCAL_ORIGINS
    access_log: str | None = None
    instance: str = "envoy-1"
    connections_max: int = CONNECTIONS_MAX
    heap_bytes_max: int = HEAP_BYTES_MAX

    def __post_init__(self) -> None:
        """Raises ParameterInvalid where the parts do not make a mesh."""
        _check_endpoints("gateway", self.gateways)
        _check_endpoints("controller", self.controllers)
        if self.listen.is_name or (self.probe is not None and self.probe.is_name):
            raise ParameterInvalid("Envoy listens on addresses, not on names.")
        if self.connections_max < 1:
            raise ParameterInvalid("At least one connection is needed.")
        if self.heap_bytes_max < _HEAP_BYTES_MIN:
            raise ParameterInvalid(f"Envoy needs at least {_HEAP_BYTES_MIN} bytes of memory.")


def _check_endpoints(kind: str, endpoints: tuple[Endpoint, ...]) -> None:
    if not endpoints:
        raise ParameterInvalid(f"At least one {kind} is needed.")
    if len(set(endpoints)) != len(endpoints):
        raise ParameterInvalid(f"A {kind} is named twice; it would get twice its share.")
