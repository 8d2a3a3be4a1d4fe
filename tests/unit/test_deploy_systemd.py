"""The units: what they give a process is what it reads, and they wait as long as it drains."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from deploy.envoy import generate
from tests.fixtures.manifests import CONFIGS, GIVEN, ROOT, places, settings

SYSTEMD = ROOT / "deploy" / "systemd"
UNITS = {file.name: file for file in sorted(SYSTEMD.glob("*.service"))}
# What the owner writes into the files that the units name.
FILES = {
    "/etc/interlock/mesh.env": {
        "INTERLOCK_MESH_TOKEN": GIVEN["mesh-token"],
        "INTERLOCK_GATEWAY_CONTROLLERS": '["192.0.2.11:50052"]',
        "INTERLOCK_WORKER_CONTROLLERS": '["192.0.2.11:50052"]',
        "HOST_ADDRESS": "192.0.2.21",
    },
    "/etc/interlock/tokens.env": {
        "INTERLOCK_JWT_SECRET": GIVEN["jwt-secret"],
        "INTERLOCK_REDIS_URL": GIVEN["redis-url"],
    },
    "/etc/interlock/controller.env": {
        "INTERLOCK_CONTROLLER_MODEL_PATH": "/srv/model",
        "INTERLOCK_CONTROLLER_MODEL_NAME": GIVEN["model-name"],
    },
}


def _unit(service: str) -> list[tuple[str, str]]:
    (name,) = [name for name in UNITS if name.startswith(f"interlock-{service}")]
    lines = (line for line in UNITS[name].read_text().splitlines() if "=" in line and line[:1] != "#")
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


def _all(service: str, key: str) -> list[str]:
    return [value for found, value in _unit(service) if found == key]


def _one(service: str, key: str) -> str:
    (value,) = _all(service, key)
    return value


def _environment(service: str, port: str) -> dict[str, str]:
    """What the process finds, as systemd puts it together."""
    found: dict[str, str] = {}
    for file in _all(service, "EnvironmentFile"):
        found |= FILES.get(file.removeprefix("-"), {})
    given = [*_all(service, "Environment"), *re.findall(r"INTERLOCK_\S+=\S+", _one(service, "ExecStart"))]
    for text in given:
        name, _, value = text.partition("=")
        for mark, meaning in (("%H", "node-1"), ("%i", port), ("${HOST_ADDRESS}", found["HOST_ADDRESS"])):
            value = value.replace(mark, meaning)
        found[name] = value
    # A service looks at its own prefix and at what all share.
    other = tuple(f"INTERLOCK_{name.upper()}_" for name in CONFIGS if name != service)
    return {name: value for name, value in found.items() if not name.startswith(other)}


@pytest.mark.parametrize(
    ("service", "port"), [("gateway", "50053"), ("worker", "50061"), ("controller", "50052")]
)
def test_a_service_understands_its_unit(service: str, port: str) -> None:
    """Its own reader takes every variable, and it listens where the instance says."""
    found = settings(service, _environment(service, port))
    host, _, bound = found.bind.rpartition(":")
    assert (host, bound) == ("192.0.2.21" if service == "worker" else "0.0.0.0", port)  # noqa: S104 - the machine's
    assert found.id == ("node-1" if service == "controller" else f"node-1-{port}")
    assert _one(service, "ExecStart").endswith(f"/opt/interlock/bin/python -m services.{service}")
    writable = {f"/var/cache/{name.replace('%i', port)}" for name in _all(service, "CacheDirectory")}
    writable |= {f"/var/lib/{name}" for name in _all(service, "StateDirectory")}
    assert {str(place) for place in places(found)} - {"/srv/model"} == writable


def test_a_unit_waits_as_long_as_its_process_drains() -> None:
    """systemd's patience is longer than the drain of the settings, and than Envoy's script takes."""
    gateway = settings("gateway", _environment("gateway", "50051"))
    worker = settings("worker", _environment("worker", "50061"))
    assert float(_one("gateway", "TimeoutStopSec")) > gateway.drain_notice_s + gateway.drain_grace_s
    assert float(_one("worker", "TimeoutStopSec")) > worker.drain_grace_s
    script, _, seconds = _one("envoy", "ExecStop").split()
    assert generate.DESCRIPTORS.with_name(script.rpartition("/")[2]).exists()
    assert float(_one("envoy", "TimeoutStopSec")) > float(seconds)


def test_workers_are_not_given_what_makes_tokens() -> None:
    """The file with the secret and the store's URL is not read by their unit."""
    assert "/etc/interlock/tokens.env" not in _all("worker", "EnvironmentFile")
    assert "/etc/interlock/tokens.env" in _all("gateway", "EnvironmentFile")


@pytest.mark.parametrize("unit", UNITS)
def test_no_unit_runs_as_root_or_may_become_it(unit: str) -> None:
    """A user of its own, no way up, a file system that is read-only but for its cache."""
    text = UNITS[unit].read_text()
    for line in ("User=interlock", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="):
        assert f"\n{line}\n" in text
    assert "\nRestart=always\n" in text


def test_systemd_itself_has_no_complaint() -> None:
    """`systemd-analyze verify` reads the units; programs that are elsewhere here are not its matter."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian's package `systemd`)")
    done = subprocess.run(
        [analyze, "verify", *map(str, UNITS.values())],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    told = [
        line for line in done.stderr.splitlines() if ".service:" in line and "is not executable" not in line
    ]
    assert told == []


def test_the_guide_names_every_file_that_a_unit_reads() -> None:
    """Nobody has to look into the units for what to write where."""
    guide = (SYSTEMD / "README.md").read_text()
    for service in CONFIGS:
        for file in _all(service, "EnvironmentFile"):
            assert file.rpartition("/")[2] in guide
    for names in FILES.values():
        assert all(name in guide for name in names)
