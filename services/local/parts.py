"""The services of a local mesh. Owns: what each process is told at its start."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.local import ports
from services.local.child import Launch
from services.local.home import Home

_PREFIX = "INTERLOCK_"
# What each service may know of what the mesh shares: a worker runs the model and checks no token.
_SHARED_NAMES = {
    "controller": ("REDIS_URL", "JWT_SECRET", "MESH_TOKEN", "LOG_LEVEL", "REFLECTION"),
    "gateway": ("REDIS_URL", "JWT_SECRET", "MESH_TOKEN", "LOG_LEVEL", "REFLECTION"),
    "worker": ("MESH_TOKEN", "LOG_LEVEL", "REFLECTION"),
}


def plain(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that is not ours: without the mesh's settings and secrets."""
    return {name: value for name, value in environ.items() if not name.startswith(_PREFIX)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """What `interlock up` was asked for.

    Attributes:
        model_path: Directory of the model, in Hugging Face format.
        model_name: The name that requests give.
        workers: How many workers; at least 1.
        gateways: How many gateways; at least 1.
        controllers: How many controllers; at least 1. One leads, the others stand by.
        quantization: `auto`, `none`, `int8`, `nf4` or `fp4`.
        dtype: `auto`, `fp32` or `bf16`.
        port: Envoy's port; 0 makes every port a free one.
        worker_memory_bytes: What each worker may count on; 0: the machine's memory.
    """

    model_path: Path
    model_name: str
    workers: int = 1
    gateways: int = 1
    controllers: int = 1
    quantization: str = "auto"
    dtype: str = "auto"
    port: int = ports.HTTP_PORT
    worker_memory_bytes: int = 0


@dataclass(slots=True)
class ServicePart:
    """One server process: its settings, and the address that it keeps once it has one.

    Attributes:
        service: The package under `services`.
        id: Its name in the mesh.
        bind: `host:port` of the next start.
        announce_file: Where it says that it listens.
        settings: Its own fields, by name.
        shared: What the mesh shares, by variable; each service is told what it may know.
        metrics_bind: Where it shows its metrics.
    """

    service: str
    id: str
    bind: str
    announce_file: Path
    settings: Mapping[str, str]
    shared: Mapping[str, str]
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    metrics_bind: str = ""

    def launch(self) -> Launch:
        """The next start. Settings of the caller's environment reach the service; the mesh's own win."""
        self.announce_file.unlink(missing_ok=True)
        own = {
            "id": self.id,
            "bind": self.bind,
            "metrics_bind": self.metrics_bind,
            "announce_file": str(self.announce_file),
            **self.settings,
        }
        prefix = f"{_PREFIX}{self.service.upper()}_"
        shared = {_PREFIX + name for name in _SHARED_NAMES[self.service]}
        environment = {
            **plain(self.environ),
            **{
                name: value
                for name, value in (*self.environ.items(), *self.shared.items())
                if name in shared or name.startswith(prefix)
            },
            **{prefix + name.upper(): value for name, value in own.items()},
            # A log line is on disk when it was written, and so in the tail of a crash.
            "PYTHONUNBUFFERED": "1",
        }
        # -P: a directory named `services` where the user stands is not ours.
        return Launch((sys.executable, "-P", "-m", f"services.{self.service}"), environment)


def controller(home: Home, number: int, bind: str, plan: MeshPlan, shared: Mapping[str, str]) -> ServicePart:
    """A controller. All of them share one directory: what one took in the next one leads with."""
    settings = {
        "model_path": str(plan.model_path),
        "model_name": plan.model_name,
        "quantization": plan.quantization,
        "compute_dtype": plan.dtype,
        "data_dir": str(home.path / "controller"),
    }
    return _part("controller", number, home, bind, settings, shared)


def gateway(home: Home, number: int, bind: str, controllers: str, shared: Mapping[str, str]) -> ServicePart:
    """A gateway; `controllers` is a JSON list of addresses."""
    settings = {"controllers": controllers, "cache_dir": str(home.cache / f"gateway-{number}")}
    if "INTERLOCK_GATEWAY_MODEL_ALIASES" not in os.environ:
        # One model, so code that asks for another one's name means it.
        settings["model_aliases"] = json.dumps(["gpt-*=", "o1*=", "o3*=", "o4*=", "claude-*="])
    return _part("gateway", number, home, bind, settings, shared)


def worker(
    home: Home, number: int, bind: str, controllers: str, plan: MeshPlan, shared: Mapping[str, str]
) -> ServicePart:
    """A worker; `controllers` is a JSON list of addresses."""
    settings = {"controllers": controllers, "cache_dir": str(home.cache / "workers")}
    if plan.worker_memory_bytes:
        settings["memory_bytes"] = str(plan.worker_memory_bytes)
    if plan.workers > 1 and "INTERLOCK_WORKER_THREADS" not in os.environ:
        # Two models that each take every core are slower than two that share them.
        cores = len(os.sched_getaffinity(0))
        settings["threads"] = str(max(1, cores // plan.workers))
    return _part("worker", number, home, bind, settings, shared)


def _part(
    service: str,
    number: int,
    home: Home,
    bind: str,
    settings: Mapping[str, str],
    shared: Mapping[str, str],
) -> ServicePart:
    name = f"{service}-{number}"
    return ServicePart(service, name, bind, home.run / f"{name}.json", settings, shared)
