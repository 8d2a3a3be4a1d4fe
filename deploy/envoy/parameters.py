"""Envoy's parameters. Owns: what may differ between two shipped configurations, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Pages served by a developer's own machine; a deployment names its origins.
LOCAL_ORIGINS = (r"https?://(localhost|127\.0\.0\.1)(:\d{1,5})?",)

PORT_MAX = 65_535
ADMIN_PORT = 9901


class ParameterInvalid(ValueError):
    """A parameter cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one process listens.

    Attributes:
        host: An IP address; the clusters are static, so a name would not be resolved.
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

    def __str__(self) -> str:
        """`host:port`, as `parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One configuration. The defaults are those of a mesh on one machine.

    Attributes:
        listen: Where clients connect. Loopback unless somebody decides otherwise.
        admin: Envoy's admin interface: loopback, or a Unix socket's path, for it can stop Envoy.
        gateways: Every gateway process; Envoy keeps about one connection a thread to each.
        controller: The controller's address, for admin calls.
        descriptors: The descriptor set of `interlock.http.v1`, as Envoy opens it.
        cors_origins: Regular expressions of the web origins whose pages may call.
        access_log: File of the access log; None writes it to standard output.
    """

    listen: Endpoint = Endpoint("127.0.0.1", 8080)
    admin: Endpoint | Path = Endpoint("127.0.0.1", ADMIN_PORT)
    gateways: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", 50051),)
    controller: Endpoint = Endpoint("127.0.0.1", 50052)
    descriptors: str = "deploy/envoy/interlock.binpb"
    cors_origins: tuple[str, ...] = LOCAL_ORIGINS
    access_log: str | None = None

    def __post_init__(self) -> None:
        """Raises ParameterInvalid where the parts do not make a mesh."""
        if not self.gateways:
            raise ParameterInvalid("At least one gateway is needed.")
        if len(set(self.gateways)) != len(self.gateways):
            raise ParameterInvalid("A gateway is named twice; it would get twice its share.")
