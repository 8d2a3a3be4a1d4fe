"""The state file. Owns: how a running mesh describes itself to `interlock` commands and to tests."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class StateUnreadable(Exception):
    """A state file is not one of this version; the message names it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the mesh.

    Attributes:
        id: Its name.
        address: `host:port`, or the URL of the store.
        pid: Its process; 0: not ours.
        metrics: `host:port` of its `/metrics`; empty: it has none.
    """

    id: str
    address: str
    pid: int
    metrics: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshState:
    """A mesh that is ready.

    Attributes:
        http: URL for clients.
        gateways: The gateways.
        controllers: The controllers.
        workers: The workers.
        envoy: Envoy; its address is that of `http`.
        redis: The store.
        token_file: Holds a token with every scope.
        pid: The supervisor.
        model: The name of the model that it serves.
        admin: `unix://` and the path of the socket of Envoy's admin interface.
    """

    http: str
    gateways: tuple[Part, ...]
    controllers: tuple[Part, ...]
    workers: tuple[Part, ...]
    envoy: Part
    redis: Part
    token_file: str
    pid: int
    model: str
    admin: str

    def parts(self) -> tuple[tuple[str, Part], ...]:
        """Every process with its kind, in the order of their start."""
        return (
            ("redis", self.redis),
            *(("controller", part) for part in self.controllers),
            *(("worker", part) for part in self.workers),
            *(("gateway", part) for part in self.gateways),
            ("envoy", self.envoy),
        )

    def with_pid(self, id: str, pid: int) -> MeshState:  # noqa: A002 - the field's name
        """The same mesh after the part `id` was started again as process `pid`."""

        def renewed(part: Part) -> Part:
            return dataclasses.replace(part, pid=pid) if part.id == id else part

        return dataclasses.replace(
            self,
            gateways=tuple(renewed(part) for part in self.gateways),
            controllers=tuple(renewed(part) for part in self.controllers),
            workers=tuple(renewed(part) for part in self.workers),
            envoy=renewed(self.envoy),
            redis=renewed(self.redis),
        )


def write(path: Path, state: MeshState) -> None:
    """Replaces the state file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    temporary.replace(path)


def read(path: Path) -> MeshState | None:
    """The mesh that `path` describes; None when there is no such file.

    Raises:
        StateUnreadable: It is damaged, or of another version.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return MeshState(
            http=content["http"],
            gateways=_parts(content["gateways"]),
            controllers=_parts(content["controllers"]),
            workers=_parts(content["workers"]),
            envoy=Part(**content["envoy"]),
            redis=Part(**content["redis"]),
            token_file=content["token_file"],
            pid=content["pid"],
            model=content["model"],
            admin=content["admin"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise StateUnreadable(f"{path} cannot be read") from None


def _parts(items: list[dict[str, Any]]) -> tuple[Part, ...]:
    return tuple(Part(**item) for item in items)
