"""`interlock token`: what it puts into a token, who believes it, and how one is taken back."""

from __future__ import annotations

from pathlib import Path

import jwt
import pytest

from services.cli.__main__ import main
from services.common.token_claims import AskedLimits
from services.common.token_keys import PublishedKeys, read_key_set
from services.common.token_mint import read_signing_key
from services.common.tokens import TokenVerifier
from services.local.home import Home
from tests.fakes import cli_mesh
from tests.fakes.cli_mesh import FakeMesh
from tests.fixtures.token_forge import key_set, private_pem

Capture = pytest.CaptureFixture[str]


def test_a_token_names_limits_and_its_id(home: Home, capsys: Capture) -> None:
    """What was asked for is in the claims, nothing else is; without `--jti` each token has its own."""
    home.prepare()
    verifier = TokenVerifier(home.jwt_secret)
    assert (
        main(["token", "--tokens-per-minute", "6000", "--concurrency", "4", "--weight", "3", "--jti", "x"])
        == 0
    )
    claims = verifier.verify(capsys.readouterr().out.strip())
    assert (claims.limits, claims.token_id) == (AskedLimits(6_000, 4, 3), "x")
    ids = set()
    for _ in range(2):
        assert main(["token"]) == 0
        claims = verifier.verify(capsys.readouterr().out.strip())
        assert claims.limits == AskedLimits()
        ids.add(claims.token_id)
    assert len(ids - {None}) == 2


def test_a_token_of_a_key_file_is_believed_by_its_key_set(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    """`token jwks` prints what services are given, `token --key` what they then believe, without a home."""
    pem = tmp_path / "signer.pem"
    pem.write_bytes(private_pem("ES256"))
    assert main(["token", "jwks", str(pem)]) == 0
    document = capsys.readouterr().out
    assert '"d"' not in document
    assert main(["token", "--key", str(pem), "--sub", "alice"]) == 0
    keys = PublishedKeys("ES256")
    keys.replace(read_key_set(document.encode(), "ES256"))
    assert TokenVerifier(keys).verify(capsys.readouterr().out.strip()).subject == "alice"
    assert not home.path.exists()


def test_a_token_of_a_secret_needs_no_home(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As an operator makes the first one for a mesh in containers, whose secret the environment has."""
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", "x" * 64)
    assert main(["token", "--sub", "ops", "--scope", "admin generate"]) == 0
    claims = TokenVerifier("x" * 64).verify(capsys.readouterr().out.strip())
    assert (claims.subject, claims.scopes) == ("ops", frozenset({"admin", "generate"}))
    assert not home.path.exists()


def test_a_token_that_the_mesh_would_not_believe_is_not_made(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A mesh that was started with a secret of the environment; `status` shows what it can all the same."""
    with cli_mesh.running(Home(home.path, {"INTERLOCK_JWT_SECRET": "x" * 64})):
        assert main(["token"]) == 1
        told = capsys.readouterr()
        assert "INTERLOCK_JWT_SECRET" in told.err
        assert told.out == ""
        assert main(["models", "list"]) == 1
        assert "INTERLOCK_JWT_SECRET" in capsys.readouterr().err
        assert main(["status"]) == 0
        assert "gateway-1" in capsys.readouterr().out
        monkeypatch.setenv("INTERLOCK_JWT_SECRET", "x" * 64)
        assert main(["token"]) == 0
        assert TokenVerifier("x" * 64).verify(capsys.readouterr().out.strip()).subject == "local"
        assert main(["models", "list"]) == 0


@pytest.mark.parametrize("by_variables", [True, False], ids=["variables", "flags"])
def test_a_token_names_issuer_and_audience_of_services_elsewhere(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, *, by_variables: bool
) -> None:
    """By the variables that tell those services, or by flags; whichever way it is signed."""
    issuer, audience = "https://issuer.example", "mesh"
    flags = [] if by_variables else ["--issuer", issuer, "--audience", audience]
    monkeypatch.setenv("INTERLOCK_JWT_ISSUER", issuer if by_variables else "another")
    monkeypatch.setenv("INTERLOCK_JWT_AUDIENCE", audience if by_variables else "another")
    pem = tmp_path / "signer.pem"
    pem.write_bytes(private_pem("ES256"))
    keys = PublishedKeys("ES256")
    keys.replace(read_key_set(key_set(read_signing_key(pem.read_bytes())), "ES256"))
    assert main(["token", "--key", str(pem), *flags]) == 0
    verifier = TokenVerifier(keys, issuer=issuer, audience=audience)
    assert verifier.verify(capsys.readouterr().out.strip()).subject == "local"
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", "x" * 64)
    assert main(["token", *flags]) == 0
    verifier = TokenVerifier("x" * 64, issuer=issuer, audience=audience)
    assert verifier.verify(capsys.readouterr().out.strip()).subject == "local"
    assert not home.path.exists()


@pytest.mark.parametrize("secret", ["", "x" * 64], ids=["of the home", "of the environment"])
def test_a_token_for_the_mesh_of_the_home_has_the_usual_names(
    home: Home, secret: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Its services are told nothing of the variables, so neither does the token go by them."""
    for name in ("ISSUER", "AUDIENCE"):
        monkeypatch.setenv(f"INTERLOCK_JWT_{name}", "elsewhere")
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", secret)
    with cli_mesh.running(Home(home.path, {"INTERLOCK_JWT_SECRET": secret})):
        assert main(["token"]) == 0
    verifier = TokenVerifier(secret or home.jwt_secret)
    assert verifier.verify(capsys.readouterr().out.strip()).subject == "local"


@pytest.mark.parametrize("believed", ["", "y" * 64], ids=["of the home", "of another environment"])
def test_a_secret_that_is_not_the_mesh_s_is_that_of_services_elsewhere(
    home: Home, believed: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Its token has their names, whoever runs in the home; commands that enter that mesh say so."""
    for name in ("ISSUER", "AUDIENCE"):
        monkeypatch.setenv(f"INTERLOCK_JWT_{name}", "elsewhere")
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", "x" * 64)
    with cli_mesh.running(Home(home.path, {"INTERLOCK_JWT_SECRET": believed})):
        assert main(["token"]) == 0
        verifier = TokenVerifier("x" * 64, issuer="elsewhere", audience="elsewhere")
        assert verifier.verify(capsys.readouterr().out.strip()).subject == "local"
        assert main(["models", "list"]) == 1
        assert "INTERLOCK_JWT_SECRET" in capsys.readouterr().err
        assert not home.token_file.exists()


@pytest.mark.parametrize("arguments", [["token", "--key"], ["token", "jwks"]], ids=["sign", "publish"])
def test_a_file_that_signs_nothing_is_named(
    arguments: list[str], home: Home, tmp_path: Path, capsys: Capture
) -> None:
    """Its path and what is wrong with it, in one line."""
    del home
    for content, words in ((b"nonsense", "private key"), (None, "No such file")):
        pem = tmp_path / "signer.pem"
        pem.unlink(missing_ok=True)
        if content is not None:
            pem.write_bytes(content)
        assert main([*arguments, str(pem)]) == 1
        told = capsys.readouterr().err
        assert "signer.pem" in told
        assert words in told


def test_a_token_is_revoked_by_itself_or_by_its_id(mesh: FakeMesh, capsys: Capture) -> None:
    """Only the id is sent; the answer says until when it is remembered, and what nobody has looked at."""
    assert main(["token", "--jti", "stolen"]) == 0
    token = capsys.readouterr().out.strip()
    for given, is_unseen in (([token], False), (["stolen"], True), (["--id", "some.other.id"], True)):
        assert main(["token", "revoke", *given]) == 0
        told = capsys.readouterr().out
        assert "2027-01-15" in told
        assert ("nobody knows" in told) is is_unseen
    assert mesh.revoked == ["stolen", "stolen", "some.other.id"]


def test_a_broken_token_is_not_taken_for_an_id(mesh: FakeMesh, capsys: Capture) -> None:
    """Whoever pasted half of one learns that it is still believed; nobody is asked."""
    assert main(["token"]) == 0
    token = capsys.readouterr().out.strip()
    head, payload, signature = token.split(".")
    for given in (head, token[:60], f"{head}.{payload}", token[3:], f"{head}.{payload[:-9]}.{signature}"):
        assert main(["token", "revoke", given]) == 1, given
        assert "Nothing is revoked" in capsys.readouterr().err
    assert mesh.revoked == []


def test_a_token_without_an_id_cannot_be_revoked(mesh: FakeMesh, capsys: Capture) -> None:
    """The command says so, and asks nobody."""
    assert main(["token", "revoke", jwt.encode({"sub": "a"}, "x" * 32)]) == 1
    assert "no jti" in capsys.readouterr().err
    assert mesh.revoked == []


@pytest.mark.parametrize("token_id", ["", "a\nb", "x" * 257])
def test_an_id_is_a_name(token_id: str, home: Home, capsys: Capture) -> None:
    """Nobody would believe a token with another one."""
    home.prepare()
    assert main(["token", "--jti", token_id]) == 1
    assert "--jti" in capsys.readouterr().err
