"""The Dockerfile and the compose file: well made, and in step with the services and with Envoy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from deploy.envoy import generate
from tests.fakes.edge import FakeBackend
from tests.fixtures.manifests import (
    CONFIGS,
    DOCKERFILE,
    GIVEN,
    ROOT,
    envoys_entrypoint,
    places,
    settings,
    stage,
)

DOCKER = ROOT / "deploy" / "docker"
SERVICES = tuple(CONFIGS)
ENVIRONMENT = {
    "INTERLOCK_MODEL_DIRECTORY": "/srv/model",
    "INTERLOCK_MODEL_NAME": GIVEN["model-name"],
    "INTERLOCK_JWT_SECRET": GIVEN["jwt-secret"],
    "INTERLOCK_MESH_TOKEN": GIVEN["mesh-token"],
}

(VARIANT,) = [variant for variant in generate.shipped() if variant.name == "docker"]


def _compose() -> dict[str, Any]:
    """The file with its variables filled in, as the engine reads it."""
    text = re.sub(
        r"\$\{(\w+):(?:\?[^}]*|-([^}]*))\}",
        lambda found: ENVIRONMENT[found[1]] if found[2] is None else found[2],
        (DOCKER / "compose.yaml").read_text(),
    )
    assert "${" not in text
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def _image_environment(service: str) -> dict[str, str]:
    return dict(re.findall(r"(INTERLOCK_\w+)=(\S+)", stage(service)))


def test_the_dockerfile_has_no_finding() -> None:
    """hadolint, which also reads the shell in it, has nothing to say, not even as advice."""
    done = subprocess.run(
        ["hadolint", "--no-fail", "--format", "json", str(DOCKER / "Dockerfile")],
        capture_output=True,
        check=True,
        timeout=30,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("target", [*SERVICES, "envoy"])
def test_nothing_runs_as_root_or_with_what_built_it(target: str) -> None:
    """Each target is the small base, which has a user, with one environment copied in."""
    made = stage(target)
    assert made.startswith("FROM base AS")
    assert f"COPY --from={target}-build /opt/interlock /opt/interlock" in made
    assert "USER" not in made
    assert re.search(r"^USER 10001:10001$", stage("base"), re.MULTILINE)
    assert "HEALTHCHECK" in made


@pytest.mark.parametrize("service", SERVICES)
def test_each_image_has_its_services_own_dependencies(service: str) -> None:
    """The extra of the service's name, at the versions that are tested; so only workers carry torch."""
    extras = {"controller": "controller,s3"}.get(service, service)
    assert f'install --constraint constraints.txt ".[{extras}]"' in stage(f"{service}-build")


def test_what_is_copied_is_there_and_is_sent() -> None:
    """Every file that an image takes exists, and `.dockerignore` lets it through and little else."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    let_through = [rule.removeprefix("!") for rule in rules if rule[:1] == "!"]
    copied = [
        path
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for path in line.split()[:-1]
    ]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert any(path == known or path.startswith(f"{known}/") for known in let_through), path
    assert all((ROOT / path).exists() for path in let_through)
    assert not {"tests", ".venv", ".interlock", "deploy"} & set(let_through)
    # The last rule that fits decides: no secret of the folder of the compose file is sent, nor committed.
    assert rules[-1] == "**/.env"
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_compose_file_is_valid() -> None:
    """By the Compose Specification; a misspelt key is refused."""
    document = _compose()
    assert set(PyCompose.from_json(json.dumps(document)).service_names()) == {*SERVICES, "envoy", "redis"}
    document["services"]["envoy"]["prots"] = ["1:1"]
    with pytest.raises(ValueError, match="prots"):
        PyCompose.from_json(json.dumps(document))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_understands_what_compose_tells_it(service: str) -> None:
    """Image and compose file together, read by the service itself."""
    told = _compose()["services"][service]
    assert told["build"]["target"] == service
    environ = _image_environment(service) | {key: str(value) for key, value in told["environment"].items()}
    found = settings(service, environ)
    assert found.metrics_bind == "0.0.0.0:9464"
    # The container's file system is read-only: each place is a volume.
    mounts = {volume.split(":")[1] for volume in told.get("volumes", ())}
    mounts |= {volume.partition(":")[0] for volume in told.get("tmpfs", ())}
    assert {str(place) for place in places(found)} <= mounts
    if service != "controller":
        assert str(found.cache_dir) == "/var/cache/interlock"
        assert found.controllers == ("controller:50052",)


@pytest.mark.parametrize("service", SERVICES)
def test_the_entrypoint_names_and_binds_a_service(service: str) -> None:
    """Run as in a container: the id is the host's name, and a worker binds the host's own address."""
    port = re.search(rf'CMD \["{service}", "(\d+)"\]', DOCKERFILE)
    assert port is not None
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **_image_environment(service)}
    told = _compose()["services"][service]["environment"]
    environ |= {key: str(value) for key, value in told.items() if not key.endswith("_ID")}
    done = subprocess.run(
        [str(DOCKER / "entrypoint.sh"), service, port[1], "--print-config"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=environ,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    default = CONFIGS[service].__dataclass_fields__["bind"].default
    host, _, bound = shown["bind"].rpartition(":")
    assert bound == port[1] == default.rpartition(":")[2]
    assert (host == "0.0.0.0") == (service != "worker")  # noqa: S104 - a container's own
    assert shown["id"] == os.uname().nodename
    given = environ | {f"INTERLOCK_{service.upper()}_ID": "own-name"}
    command = [str(DOCKER / "entrypoint.sh"), service, port[1], "--print-config"]
    kept = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, env=given, cwd=ROOT
    )
    assert yaml.safe_load(kept.stdout)["id"] == "own-name"


def test_plain_text_stays_on_the_host() -> None:
    """Envoy's port is published on loopback alone, it is the one that Envoy opens, and nothing else is."""
    services = _compose()["services"]
    assert {name for name, told in services.items() if "ports" in told} == {"envoy"}
    assert services["envoy"]["ports"] == [f"127.0.0.1:8080:{VARIANT.parameters.listen.port}"]
    assert VARIANT.parameters.certificate is None


def test_envoy_finds_the_services_by_their_names() -> None:
    """What the variant names are services of the compose file, in a network that Envoy shares with them."""
    services = _compose()["services"]
    for endpoint in (*VARIANT.parameters.gateways, *VARIANT.parameters.controllers):
        assert set(services[endpoint.host]["networks"]) & set(services["envoy"]["networks"])
        default = CONFIGS[endpoint.host].__dataclass_fields__["bind"].default
        assert default.rpartition(":")[2] == str(endpoint.port)
    assert str(VARIANT.file.relative_to(ROOT)) in stage("envoy")
    probe = VARIANT.parameters.probe
    assert probe is not None
    assert f'"--http", "{probe.port}"' in stage("envoy")


def test_only_gateways_and_the_controller_reach_the_store() -> None:
    """Redis is in a network that has no way out, and has no password for that reason."""
    document = _compose()
    assert document["networks"]["store"] == {"internal": True}
    inside = {name for name, told in document["services"].items() if "store" in told["networks"]}
    assert inside == {"redis", "gateway", "controller"}
    assert document["services"]["redis"]["networks"] == ["store"]


def _grace_s(service: str) -> float:
    """For how long the engine waits between SIGTERM and SIGKILL."""
    return float(_compose()["services"][service]["stop_grace_period"].removesuffix("s"))


def test_containers_have_the_time_to_drain() -> None:
    """Longer than the longest drain of the services' defaults, and than Envoy's image drains for."""
    for service in ("gateway", "worker"):
        told = _compose()["services"][service]
        found = settings(service, {key: str(value) for key, value in told["environment"].items()})
        longest = found.drain_grace_s + getattr(found, "drain_notice_s", 0)
        assert _grace_s(service) > longest
    script, admin_port, seconds, notice_seconds, program, *_ = envoys_entrypoint()
    assert (script, program) == ("drained.sh", "envoy")
    for name in (script, "drain.sh"):
        assert re.search(rf"^COPY .*deploy/envoy/{name} .*/usr/local/bin/$", stage("envoy"), re.MULTILINE)
    assert str(VARIANT.parameters.admin) == f"127.0.0.1:{admin_port}"
    assert _grace_s("envoy") > float(seconds) > float(notice_seconds)
    # Another beginning would know nothing of draining.
    assert "entrypoint" not in _compose()["services"]["envoy"]


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    """A server with gRPC health."""
    backend = FakeBackend("gateway")
    backend.start()
    yield backend
    backend.stop()


def test_the_health_command_tells_what_health_says(backend: FakeBackend) -> None:
    """0 while it serves; 1 while it does not, and when nobody is there."""
    port = backend.address.rpartition(":")[2]

    def healthy(*arguments: str) -> int:
        command = [sys.executable, str(DOCKER / "healthy.py"), *arguments]
        return subprocess.run(command, check=False, timeout=20, capture_output=True).returncode

    backend.set_serving(serving=True)
    assert healthy(port) == 0
    backend.set_serving(serving=False)
    assert healthy(port) == 1
    backend.stop()
    assert healthy(port) == 1
    assert healthy("--http", port) == 1
