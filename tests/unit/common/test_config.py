"""How settings are read, and how mistakes in them are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, SecretStr

from services.common.config import ConfigInvalid, from_command_line, load, printed
from services.controller.config import ControllerConfig
from services.gateway.config import GatewayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Settings of an imagined service."""

    jwt_secret: SecretStr
    port: Annotated[int, Field(ge=0, le=65_535, description="Where it listens.")] = 80
    wait_s: float = 1.5
    peers: tuple[str, ...] = ()
    cache_dir: Path | None = None


SECRET = {"INTERLOCK_JWT_SECRET": "not-to-be-shown"}


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    """Sources are applied in their documented order, and text is converted to the field's type."""
    file = tmp_path / "sample.yaml"
    file.write_text("port: 81\nwait_s: 2\n")
    environ = SECRET | {
        "INTERLOCK_SAMPLE_PORT": "82",
        "INTERLOCK_SAMPLE_PEERS": '["a", "b"]',
        "INTERLOCK_SAMPLE_CACHE_DIR": "/var/cache",
        "INTERLOCK_OTHER_PORT": "83",
    }
    config = load(SampleConfig, "sample", file=file, environ=environ)
    assert (config.port, config.wait_s, config.peers) == (82, 2.0, ("a", "b"))
    assert config.cache_dir == Path("/var/cache")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"INTERLOCK_SAMPLE_PROT": "1"}, "INTERLOCK_SAMPLE_PROT: unknown"),
        ({"INTERLOCK_SAMPLE_PORT": "eighty"}, "INTERLOCK_SAMPLE_PORT"),
        ({"INTERLOCK_SAMPLE_PORT": "65536"}, "INTERLOCK_SAMPLE_PORT"),
        ({"INTERLOCK_SAMPLE_PEERS": "[broken"}, "INTERLOCK_SAMPLE_PEERS"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], named: str) -> None:
    """Whoever reads the error knows which variable to correct."""
    with pytest.raises(ConfigInvalid, match=named):
        load(SampleConfig, "sample", file=None, environ=SECRET | environ)


def test_a_missing_setting_is_named() -> None:
    """A required field without a value stops the start."""
    with pytest.raises(ConfigInvalid, match="jwt_secret"):
        load(SampleConfig, "sample", file=None, environ={})


@pytest.mark.parametrize(
    "text", ["prot: 1", "- a list", "port: !!python/object/apply:os.getpid []", "port: [", "\xff"]
)
def test_a_file_that_is_not_plain_settings_is_refused(tmp_path: Path, text: str) -> None:
    """Unknown keys, lists, YAML tags and broken text all stop the start."""
    file = tmp_path / "sample.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigInvalid):
        load(SampleConfig, "sample", file=file, environ=SECRET)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """A wrong path is told with the path."""
    with pytest.raises(ConfigInvalid, match="absent"):
        load(SampleConfig, "sample", file=tmp_path / "absent.yaml", environ=SECRET)


def test_secrets_are_shown_neither_by_print_config_nor_by_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--print-config` masks them, and a validation error does not repeat its input."""
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", "not-to-be-shown")
    with pytest.raises(SystemExit) as shown:
        from_command_line(SampleConfig, "sample", ["--print-config"])
    monkeypatch.setenv("INTERLOCK_SAMPLE_PORT", "not-to-be-shown")
    with pytest.raises(SystemExit) as refused:
        from_command_line(SampleConfig, "sample", [])
    output = "".join(capsys.readouterr())
    assert (shown.value.code, refused.value.code) == (0, 2)
    assert "port: 80" in output
    assert "INTERLOCK_SAMPLE_PORT" in output
    assert "not-to-be-shown" not in output


def test_the_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Each by its name, and by what it says of itself."""
    with pytest.raises(SystemExit) as ended:
        from_command_line(SampleConfig, "sample", ["--help"])
    settings = capsys.readouterr().out.partition("settings:\n")[2]
    assert ended.value.code == 0
    assert [line.strip() for line in settings.splitlines()] == [
        "jwt_secret",
        "port",
        "Where it listens.",
        "wait_s",
        "peers",
        "cache_dir",
    ]


@pytest.mark.parametrize(("kind", "service"), [(GatewayConfig, "gateway"), (ControllerConfig, "controller")])
def test_the_help_names_every_form_of_the_stores_url(
    capsys: pytest.CaptureFixture[str], kind: type, service: str
) -> None:
    """Sentinel and Cluster are not found by guessing."""
    with pytest.raises(SystemExit):
        from_command_line(kind, service, ["--help"])
    told = capsys.readouterr().out
    for scheme in ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster"):
        assert f"{scheme}://" in told


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    """The printed settings are a valid file but for the secrets."""
    config = load(SampleConfig, "sample", file=None, environ=SECRET | {"INTERLOCK_SAMPLE_PEERS": '["a"]'})
    file = tmp_path / "sample.yaml"
    file.write_text(printed(config))
    again = load(SampleConfig, "sample", file=file, environ={})
    assert again.peers == ("a",)
