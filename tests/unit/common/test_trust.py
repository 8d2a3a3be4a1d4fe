"""How a process comes to judge tokens, and which settings stop its start."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from services.common import config, trust
from services.common.config import ConfigInvalid
from services.common.errors import TokenInvalid, TokenRevoked
from services.common.jwks import KeyFollower, source_of
from services.common.revocation import RevocationList
from services.common.system_clock import SystemClock
from services.common.token_claims import TimeRules
from services.common.token_keys import PublishedKeys, SecretWeak
from services.common.token_settings import TokenSettings
from services.common.trust import Trust
from services.controller.config import ControllerConfig
from services.gateway.config import GatewayConfig
from tests.fakes.key_server import key_server
from tests.fixtures.token_forge import SECRET, key_set, public_pem, signer, signing_key, weak_jwk

RIGHT = SecretStr(SECRET)


def built(**settings: object) -> Trust:
    """What a process with these settings builds."""
    return trust.build(TokenSettings(**settings), SystemClock(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ConfigInvalid, "jwt_secret: missing"),
        ({"jwt_secret": SecretStr("")}, SecretWeak, "32 bytes"),
        ({"jwt_secret": SecretStr("x" * 31)}, SecretWeak, "32 bytes"),
        ({"jwt_secret": SecretStr(public_pem(signing_key("RS256")).decode())}, SecretWeak, "key file"),
        ({"jwt_secret": RIGHT, "jwt_jwks": "keys.json"}, ConfigInvalid, "jwt_jwks: HS256"),
        ({"jwt_algorithm": "RS256", "jwt_secret": RIGHT}, ConfigInvalid, "jwt_jwks: missing"),
        ({"jwt_algorithm": "RS256", "jwt_jwks": "http://issuer.example/"}, ConfigInvalid, "jwt_jwks: http"),
        (
            {"jwt_algorithm": "RS256", "jwt_jwks": "ftp://issuer.example/"},
            ConfigInvalid,
            "jwt_jwks: expected",
        ),
    ],
    ids=range(8),
)
def test_settings_that_do_not_go_together_stop_the_start(
    settings: dict[str, object], error: type[Exception], words: str
) -> None:
    """One family, with its own kind of key; weak and mistaken secrets are refused."""
    with pytest.raises(error, match=words):
        built(**settings)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (None, "cannot be read"),
        (b"nonsense", "not a JWK set"),
        (key_set(), "no usable key"),
        (key_set(weak_jwk()), "no usable key"),
        (key_set(signing_key("EdDSA")), "no usable key"),
    ],
    ids=["absent", "nonsense", "empty", "weak", "another family"],
)
async def test_a_file_without_usable_keys_stops_the_start(
    tmp_path: Path, document: bytes | None, words: str
) -> None:
    """The setting is named."""
    file = tmp_path / "jwks.json"
    if document is not None:
        file.write_bytes(document)
    with pytest.raises(ConfigInvalid, match=f"jwt_jwks: .*{words}"):
        await built(jwt_algorithm="RS256", jwt_jwks=str(file)).load()


async def test_an_issuer_that_is_away_does_not_stop_the_start() -> None:
    """It may start later than we do; until its keys are there, tokens are refused. Nonsense is a mistake."""
    with key_server(key_set(signing_key("RS256"))) as issuer:
        issuer.status = 503
        tokens = built(jwt_algorithm="RS256", jwt_jwks=issuer.url)
        await tokens.load()
        with pytest.raises(TokenInvalid, match="not known here"):
            tokens.verifier.verify(signer("RS256").token())
        issuer.document, issuer.status = b"nonsense", 200
        with pytest.raises(ConfigInvalid, match="JWK set"):
            await built(jwt_algorithm="RS256", jwt_jwks=issuer.url).load()


async def test_a_secret_needs_no_follower() -> None:
    """With HS256 nothing is read, and no call waits for anything."""
    tokens = built(jwt_secret=RIGHT)
    await tokens.load()
    assert (tokens.interceptors, tokens.follower) == ((), None)
    assert tokens.verifier.verify(signer("HS256").token(jti="one")).token_id == "one"
    await tokens.revocations.revoke("one")
    with pytest.raises(TokenRevoked):
        tokens.verifier.verify(signer("HS256").token(jti="one"))


async def test_a_defect_is_told_and_ends_neither_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Revoked tokens are read again though that failed, and keys are followed all the while."""
    monkeypatch.setattr(trust, "AGAIN_S", 0.01)
    read, followed = asyncio.Event(), asyncio.Event()

    class Broken(RevocationList):
        failures = 0

        async def run(self) -> None:
            if self.failures < 2:
                self.failures += 1
                raise RuntimeError("a defect")
            read.set()
            await asyncio.Event().wait()

    class Follower(KeyFollower):
        async def run(self) -> None:
            await read.wait()
            followed.set()
            await asyncio.Event().wait()

    with key_server(key_set(signing_key("RS256"))) as issuer:
        source = source_of(issuer.url, http_allowed=True)
        follower = Follower(source, PublishedKeys("RS256"), SystemClock().monotonic)
        broken = Broken(None, TimeRules(), lambda: 0.0)
        tokens = replace(built(jwt_secret=RIGHT), revocations=broken, follower=follower)
        with capture_logs() as lines:
            running = asyncio.create_task(tokens.run())
            async with asyncio.timeout(5):
                await followed.wait()
            running.cancel()
            await asyncio.wait([running])
    assert running.cancelled()
    assert [line["event"] for line in lines] == ["trust.crashed"] * 2


def test_one_variable_reaches_every_service(tmp_path: Path) -> None:
    """Gateway and controller judge tokens alike, so one setting of the environment is for both."""
    environ = {
        "INTERLOCK_JWT_ALGORITHM": "EdDSA",
        "INTERLOCK_JWT_JWKS": "https://issuer.example/keys",
        "INTERLOCK_JWT_ISSUER": "https://issuer.example",
        "INTERLOCK_MESH_TOKEN": "m" * 32,
        "INTERLOCK_CONTROLLER_MODEL_PATH": str(tmp_path),
        "INTERLOCK_CONTROLLER_MODEL_NAME": "m",
    }
    for kind, service in ((GatewayConfig, "gateway"), (ControllerConfig, "controller")):
        found = config.load(kind, service, file=None, environ=environ)
        assert isinstance(found, TokenSettings)
        assert (found.jwt_algorithm, found.jwt_issuer) == ("EdDSA", "https://issuer.example")
        assert found.jwt_jwks == "https://issuer.example/keys"
    with pytest.raises(ConfigInvalid, match="JWT_ALGORITHM"):
        config.load(
            GatewayConfig, "gateway", file=None, environ=environ | {"INTERLOCK_JWT_ALGORITHM": "none"}
        )
