"""Commands about a mesh that the environment names: what reaches it, whom they believe, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from services.cli.__main__ import main
from services.cli.door import door_elsewhere
from services.cli.failure import CommandFailed
from services.common.tokens import SCOPES, mint
from services.local import state
from services.local.home import Home
from tests.fakes import cli_mesh
from tests.fakes.cli_mesh import FakeMesh
from tests.fixtures.certificates import certify

Capture = pytest.CaptureFixture[str]
Name = Callable[[FakeMesh], str]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Name:
    """Names a mesh to the commands, as an operator on another machine does; returns its URL."""

    def tell(mesh: FakeMesh) -> str:
        found = state.read(mesh.home.state_file)
        assert found is not None
        token = mint(mesh.home.jwt_secret, subject="ops", scopes=SCOPES, ttl_s=600)
        monkeypatch.setenv("INTERLOCK_URL", found.http)
        monkeypatch.setenv("INTERLOCK_TOKEN", token)
        return found.http

    return tell


@pytest.fixture
def elsewhere(home: Home, tmp_path: Path) -> Iterator[FakeMesh]:
    """A mesh with secrets of its own; in the home of the commands none runs."""
    del home
    with cli_mesh.running(Home(tmp_path / "elsewhere", {})) as found:
        yield found


@pytest.fixture
def guarded(home: Home, tmp_path: Path) -> Iterator[FakeMesh]:
    """The same behind TLS, with a certificate that only `tmp_path/tls/tls.crt` vouches for."""
    del home
    directory = tmp_path / "tls"
    directory.mkdir()
    certificate = certify(directory, "mesh")
    pair = ((directory / "tls.key").read_bytes(), certificate)
    with cli_mesh.running(Home(tmp_path / "elsewhere", {}), grpc.ssl_server_credentials([pair])) as found:
        yield found


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("models list", "tiny"),
        ("workers list", "worker-1"),
        ("breakers list", "gateway-1"),
        ("breakers force worker-1 open", "forced open"),
        ("chat hello", "Paris"),
        ("token revoke --id stolen", "stolen is revoked"),
    ],
)
def test_a_command_talks_to_the_mesh_that_is_named(
    command: str, words: str, elsewhere: FakeMesh, home: Home, name: Name, capsys: Capture
) -> None:
    """It needs no home, and makes none."""
    name(elsewhere)
    assert main(command.split()) == 0
    assert words in capsys.readouterr().out
    assert not home.path.exists()


def test_a_mesh_elsewhere_goes_before_the_one_at_home(
    mesh: FakeMesh, model: Path, tmp_path: Path, name: Name
) -> None:
    """A revision that is pushed reaches the one that was named alone."""
    with cli_mesh.running(Home(tmp_path / "elsewhere", {})) as other:
        name(other)
        assert main(["models", "push", str(model), "--name", "tiny", "--revision", "v2"]) == 0
    assert other.uploaded[0].manifest.revision == "v2"
    assert mesh.uploaded == []


@pytest.mark.parametrize("variable", ["INTERLOCK_CA_FILE", "SSL_CERT_FILE"])
def test_a_certificate_is_believed_by_its_authority(
    variable: str,
    guarded: FakeMesh,
    name: Name,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """The file that the commands are given, or the machine's."""
    assert name(guarded).startswith("https://")
    monkeypatch.setenv(variable, str(tmp_path / "tls" / "tls.crt"))
    assert main(["models", "list"]) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["", "other.crt"], ids=["machine", "another"])
def test_a_certificate_that_nobody_vouches_for_is_not_believed(
    file: str,
    guarded: FakeMesh,
    name: Name,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Neither the machine's authorities nor another one; where it was looked for is told, nothing is sent."""
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "other.crt").write_bytes(certify(other, "mesh"))
    name(guarded)
    monkeypatch.setenv("INTERLOCK_CA_FILE", str(tmp_path / file) if file else "")
    assert main(["token", "revoke", "--id", "stolen"]) == 1
    told = capsys.readouterr().err
    assert "INTERLOCK_URL says where" in told
    assert "interlock status" not in told
    assert guarded.revoked == []


def test_authorities_are_found_in_the_machines_directory(
    guarded: FakeMesh, name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where a system has no file with all of them: one each, named by hashes."""
    directory = tmp_path / "authorities"
    directory.mkdir()
    (directory / "README").write_text("not a certificate")
    (directory / "0a1b2c3d.0").symlink_to(tmp_path / "tls" / "tls.crt")
    (directory / "4e5f6a7b.0").symlink_to(tmp_path / "removed.crt")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.crt"))
    monkeypatch.setenv("SSL_CERT_DIR", str(directory))
    name(guarded)
    assert main(["models", "list"]) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file"), ("nonsense", "no certificate")], ids=["absent", "nonsense"]
)
def test_a_file_without_authorities_is_named(
    content: str | None,
    words: str,
    guarded: FakeMesh,
    name: Name,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """In one line, before anybody is called."""
    name(guarded)
    file = tmp_path / "ca.crt"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("INTERLOCK_CA_FILE", str(file))
    assert main(["models", "list"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert words in line


@pytest.mark.parametrize(
    ("given", "there", "lacks"),
    [
        ({"INTERLOCK_URL": "http://mesh.example"}, "INTERLOCK_URL", "INTERLOCK_TOKEN"),
        ({"INTERLOCK_TOKEN": "secret"}, "INTERLOCK_TOKEN", "INTERLOCK_URL"),
        ({"INTERLOCK_TOKEN": "secret", "INTERLOCK_URL": ""}, "INTERLOCK_TOKEN", "INTERLOCK_URL"),
    ],
    ids=["url", "token", "empty"],
)
def test_half_a_name_is_refused(
    given: dict[str, str],
    there: str,
    lacks: str,
    mesh: FakeMesh,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Also where a mesh runs at home: what was meant for another one must not reach it."""
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert main(["token", "revoke", "--id", "stolen"]) == 1
    told = capsys.readouterr().err
    assert f"{there} is set and {lacks} is not" in told
    assert "secret" not in told
    assert mesh.revoked == []


@pytest.mark.parametrize(
    "url",
    [
        "secret",
        "secret:8080",
        "grpc://secret",
        "https://",
        "https://:8443",
        "https://ops:secret@mesh.example",
        "https://secret/v1",
        "https://secret?x",
        "https://secret#x",
        "https://secret:0",
        "https://secret:65536",
        "https://secret:x",
        "https://secret:",
        "https://[::1",
        "https://secret,other",
        "https://secret\n",
    ],
)
def test_what_is_no_url_of_a_mesh_is_refused(url: str) -> None:
    """By the variable's name; nothing of its value is told, which may hold a password."""
    with pytest.raises(CommandFailed, match="INTERLOCK_URL is no URL") as caught:
        door_elsewhere({"INTERLOCK_URL": url, "INTERLOCK_TOKEN": "x"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["secret\nx", "se cret", "sécret"])
def test_what_is_no_token_is_refused(token: str) -> None:
    """A header could not carry it; it is not repeated."""
    with pytest.raises(CommandFailed, match="INTERLOCK_TOKEN is no token") as caught:
        door_elsewhere({"INTERLOCK_URL": "http://mesh.example", "INTERLOCK_TOKEN": token})
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://mesh.example", "dns:///mesh.example:80"),
        ("https://mesh.example/", "dns:///mesh.example:443"),
        ("https://[::1]:8443", "dns:///[::1]:8443"),
        ("http://unix:8080", "dns:///unix:8080"),
    ],
)
def test_a_url_leads_to_an_address(url: str, address: str) -> None:
    """With the scheme's port where none is named, and TLS for https alone; the token is not shown."""
    door = door_elsewhere({"INTERLOCK_URL": url, "INTERLOCK_TOKEN": " secret\n"})
    assert door is not None
    assert (door.address, door.metadata) == (address, (("authorization", "Bearer secret"),))
    assert (door.tls is not None) is url.startswith("https")
    assert "secret" not in repr(door)


def test_a_mesh_elsewhere_that_does_not_answer_is_told(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Nothing that runs here could explain it."""
    del home
    monkeypatch.setenv("INTERLOCK_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("INTERLOCK_TOKEN", "x")
    assert main(["models", "list"]) == 1
    told = capsys.readouterr().err
    assert "INTERLOCK_URL says where" in told
    assert "interlock status" not in told


def test_status_stays_at_home(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """It says so in one line, beside what programs read, and asks the controller that is here."""
    monkeypatch.setenv("INTERLOCK_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("INTERLOCK_TOKEN", "x")
    assert main(["status", "--json"]) == 0
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert str(mesh.home.path) in line
    assert "not of INTERLOCK_URL" in line
    assert [row["kind"] for row in json.loads(told.out)] == ["redis", "gateway", "envoy", "breaker"]
