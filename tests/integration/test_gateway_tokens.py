"""Who may call the gateway: every bad token, by gRPC and by HTTP, and what each scope allows.

Where each case of "bad input: JWT" is tested. "Here" is the first test, whose ids are the names in
`tests/fixtures/token_forge.py`; the same names run for every family of signatures in
`tests/unit/common/test_token_families.py`.

| case | test |
|---|---|
| `alg` none, of another family | here: `alg none`, `alg nOnE`, `alg missing`, `alg of another family` |
| RSA key as HMAC secret | here: `public key as HMAC secret`; `test_a_key_file_never_is_a_secret` |
| no or past `exp` | here: `no exp`, `past exp` |
| future `nbf`, `iat` | here: `future nbf`, `future iat` |
| wrong `aud`, `iss` | here: `wrong aud`, `aud of lists`, `wrong iss`, ... |
| `exp` as a string, in a hundred years | here, with NaN, infinity and booleans |
| duplicate claims | here, with duplicate headers |
| empty, huge, control-character `sub` | here |
| foreign `typ` | here, with `crit` |
| `kid` with a path, `jku`, `x5u` | here; `test_a_kid_opens_nothing`; `test_a_token_makes_nobody_fetch` |
| 1 MB tokens | `test_a_token_of_a_megabyte_is_refused`; here: `a token of 9 KB`; HTTP: `test_bad_bodies.py` |
| weak secrets | `test_a_weak_secret_stops_the_start`; `tests/unit/common/test_trust.py` |
| revoked `jti` | here: `revoked jti`; `tests/integration/test_revocations.py` |
| key rotation without restart | `test_keys_rotate_without_a_restart` |
| issuer that hangs | `test_an_issuer_that_hangs_holds_up_nobody`; `tests/unit/common/test_jwks_waits.py` |
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from interlock.http.v1 import http_service_pb2
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import generation_pb2

from services.common import jwks, trust
from services.common.jwks import KeySetFile, KeySetUrl
from services.common.system_clock import SystemClock
from services.common.token_settings import TokenSettings
from services.common.tokens import TokenVerifier
from services.gateway.core.tenancy import TenantBounds, TenantLimits
from tests.fakes.key_server import key_server
from tests.fakes.scripted_worker import Script
from tests.fixtures.any_call import check_prompt, methods_of, path_of, refusal
from tests.fixtures.gateway_world import GatewayWorld, bearer, joined, open_gateway, read_reply, reason_of
from tests.fixtures.token_forge import (
    BAD_TOKENS,
    REVOKED_ID,
    SECRET,
    BadToken,
    Signer,
    key_set,
    signer,
    signing_key,
)

GENERATE = next(method for method in methods_of(pb, "GatewayService") if method.name == "Generate")
RIGHT = signer("HS256")
# Stands for the address of a server that nobody may ask.
URL = "URL"


def with_claims(**claims: Any) -> tuple[tuple[str, str], ...]:
    """The metadata of a right token with these claims."""
    return bearer(RIGHT.token(**claims))


@pytest.fixture
async def gateway() -> AsyncIterator[GatewayWorld]:
    """A gateway that knows of one revoked token, and a worker that answers."""
    verifier = TokenVerifier(SECRET, is_revoked=lambda token_id: token_id == REVOKED_ID)
    async with open_gateway(verifier=verifier) as world:
        await world.add_worker("w1", Script(answer="fine"))
        yield world


async def answers(gateway: GatewayWorld, token: str) -> None:
    """Passes when a right token is answered by both ways."""
    call = gateway.call(metadata=bearer(token))
    assert joined([event async for event in call]) == "fine"
    assert (await gateway.post({"text": "hi"}, token=token)).json["result"] == "fine"


@pytest.mark.parametrize("bad", BAD_TOKENS, ids=lambda bad: bad.name)
async def test_a_bad_token_is_refused_and_the_next_call_works(gateway: GatewayWorld, bad: BadToken) -> None:
    """UNAUTHENTICATED and 401 with the same reason and words, at once; nothing reached a worker."""
    token = bad.make(RIGHT)
    error = await refusal(gateway.channel, GENERATE, bearer(token))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(error) == bad.reason
    assert bad.words in (error.details() or "")
    reply = await gateway.post({"text": "hi"}, token=token)
    assert (reply.status, reply.json["error"]["reason"]) == (401, f"ERROR_REASON_{bad.reason}")
    assert reply.json["error"]["message"] == error.details()
    assert reply.headers["x-request-id"]
    assert not gateway.workers["w1"].starts
    await answers(gateway, RIGHT.token())


async def test_bad_tokens_are_refused_at_once(gateway: GatewayWorld) -> None:
    """Whatever is wrong with them, in less than 100 ms."""
    await check_prompt(gateway.channel, [(GENERATE, bearer(bad.make(RIGHT)), b"") for bad in BAD_TOKENS])


async def test_a_token_of_a_megabyte_is_refused(gateway: GatewayWorld) -> None:
    """gRPC itself refuses headers of that size, before anything of ours reads them; the next call works."""
    error = await refusal(gateway.channel, GENERATE, bearer(RIGHT.token(padding="x" * 1_000_000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await answers(gateway, RIGHT.token())


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Basic YTpi"),),
        (("authorization", RIGHT.token()),),
        (("x-api-key", ""),),
        (("x-interlock-mesh-token", "m" * 32),),
        (("authorization-bin", b"Bearer x"),),
    ],
    ids=range(8),
)
async def test_a_call_without_a_token_is_told_how_to_get_one(gateway: GatewayWorld, metadata: Any) -> None:
    """Other schemes, other headers, and those that services speak among themselves are none."""
    error = await refusal(gateway.channel, GENERATE, metadata)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    assert "interlock token" in (error.details() or "")
    await answers(gateway, RIGHT.token())


# What each method may be called with; any one of these.
ALLOWED = {
    "Generate": {"generate"},
    "ResumeGeneration": {"generate"},
    "CancelGeneration": {"generate"},
    "CountTokens": {"generate"},
    "ListModels": {"generate", "models:read"},
    "GetUsage": {"generate"},
}
SCOPES = ("generate", "models:read", "admin", "priority:system", "", "Generate", "generate,admin")


@pytest.mark.parametrize("method", methods_of(pb, "GatewayService"), ids=lambda method: method.name)
async def test_every_method_wants_its_scope(gateway: GatewayWorld, method: Any) -> None:
    """Any other scope is PERMISSION_DENIED, and no token at all UNAUTHENTICATED, on every method there is."""
    assert reason_of(await refusal(gateway.channel, method)) == "TOKEN_MISSING"
    for scope in set(SCOPES) - ALLOWED[method.name]:
        error = await refusal(gateway.channel, method, with_claims(scope=scope))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
        assert "generate" in (error.details() or "")
    for scope in ALLOWED[method.name] - {"generate"}:
        call: Any = gateway.channel.unary_unary(f"/interlock.v1.GatewayService/{method.name}")
        await call(b"", metadata=with_claims(scope=scope))


# These tell nothing but whether somebody is there.
OPEN_PATHS = {"Healthz", "Readyz", "Console", "OpenApi"}


@pytest.mark.parametrize(
    "method", methods_of(http_service_pb2, "GatewayHttpService"), ids=lambda method: method.name
)
async def test_every_path_wants_its_scope(gateway: GatewayWorld, method: Any) -> None:
    """Every path is 401 without a token and 403 with a foreign scope."""
    call = getattr(gateway.http, method.name)
    for metadata, expected in (((), 401), (with_claims(scope="priority:system"), 403)):
        reply = await read_reply(call(HttpBody(data=b"{}"), metadata=metadata))
        assert reply.headers["x-request-id"]
        assert reply.status == (200 if method.name in OPEN_PATHS else expected)


@pytest.mark.parametrize(
    "method", methods_of(http_service_pb2, "GatewayHttpService"), ids=lambda method: method.name
)
async def test_without_a_token_no_body_is_read(gateway: GatewayWorld, method: Any) -> None:
    """Not even one that is no message: the path says 401, in its own words."""
    call: Any = gateway.channel.unary_stream(path_of(method), response_deserializer=HttpBody.FromString)
    for metadata in ((), bearer("nonsense")):
        reply = await read_reply(call(b"\xff", metadata=metadata))
        assert reply.status == (200 if method.name in OPEN_PATHS else 401)


async def test_the_systems_band_wants_its_scope(gateway: GatewayWorld) -> None:
    """`priority:system` is asked for where the priority is, and is no right to generate."""
    request = pb.GenerateRequest(text="hi", priority=generation_pb2.PRIORITY_SYSTEM)
    error = await refusal(
        gateway.channel, GENERATE, with_claims(scope="generate"), request.SerializeToString()
    )
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    both = with_claims(scope="generate priority:system")
    assert joined([event async for event in gateway.call(request, metadata=both)]) == "fine"


async def test_limits_of_the_token_become_the_principals() -> None:
    """What the `interlock` claim asks for, within the bounds of the configuration."""
    bounds = TenantBounds(most=TenantLimits(1_000, 4, 10), default=TenantLimits(100, None, 2))
    async with open_gateway(verifier=TokenVerifier(SECRET), tenants=bounds) as world:
        asked = with_claims(interlock={"tokens_per_minute": 5_000, "concurrency": 3})
        assert world.reception.authenticate(asked, "generate").limits == TenantLimits(1_000, 3, 2)
        assert world.reception.authenticate(with_claims(), "generate").limits == TenantLimits(100, 4, 2)


def settings(algorithm: str, place: str) -> TokenSettings:
    """A deployment whose keys somebody publishes."""
    return TokenSettings(jwt_algorithm=algorithm, jwt_jwks=place)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_keys_rotate_without_a_restart(
    tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call with a key that was published after the start is answered; one with a withdrawn key is not."""
    # No wait between two looks, so that the test need not wait either.
    monkeypatch.setattr(KeySetFile, "look_min_s", 0.0)
    place = tmp_path / "jwks.json"
    place.write_bytes(key_set(signing_key(algorithm, 0)))
    tokens = trust.build(settings(algorithm, str(place)), SystemClock(), None)
    await tokens.load()
    old, new = signer(algorithm, 0).token(), signer(algorithm, 1).token()
    async with open_gateway(verifier=tokens.verifier, interceptors=tokens.interceptors) as world:
        await world.add_worker("w1", Script(answer="fine"))
        await answers(world, old)
        assert reason_of(await refusal(world.channel, GENERATE, bearer(new))) == "TOKEN_INVALID"
        place.write_bytes(key_set(signing_key(algorithm, 1)))
        await answers(world, new)
        assert reason_of(await refusal(world.channel, GENERATE, bearer(old))) == "TOKEN_INVALID"


@pytest.mark.parametrize(
    "points",
    [{"kid": URL}, {"kid": "../../etc/passwd"}, {"jku": URL}, {"x5u": URL}, {"jku": URL, "kid": "elsewhere"}],
    ids=["kid as a URL", "kid as a path", "jku", "x5u", "jku and kid"],
)
async def test_a_token_makes_nobody_fetch(points: dict[str, str]) -> None:
    """Whatever the header points to: only the issuer's own set is read, and its bounds on looks hold."""
    stranger = signing_key("ES256", 9)
    with key_server(key_set(signing_key("ES256"))) as issuer, key_server(key_set(stranger)) as trap:
        tokens = trust.build(settings("ES256", issuer.url), SystemClock(), None)
        await tokens.load()
        async with open_gateway(verifier=tokens.verifier, interceptors=tokens.interceptors) as world:
            await world.add_worker("w1", Script(answer="fine"))
            header = {name: text.replace(URL, trap.url) for name, text in points.items()}
            forged = Signer("ES256", stranger.key, header).token()
            error = await refusal(world.channel, GENERATE, bearer(forged))
            assert reason_of(error) == "TOKEN_INVALID"
            assert (trap.requests, len(issuer.requests)) == ([], 1)
            await answers(world, signer("ES256").token())


async def test_an_issuer_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known keys are answered and bad tokens refused as ever; a call with a new key is refused in the end."""
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(KeySetUrl, "look_min_s", 0.0)
    hangs, goes_on = threading.Event(), threading.Event()

    def read(_: KeySetUrl) -> bytes:
        """Hangs as the search for a name does: no timeout of a socket ends it."""
        hangs.set()
        goes_on.wait(60)
        return key_set(signing_key("ES256"))

    mine = signer("ES256")
    unknown = signer("ES256", 1).token()
    bad = [one.make(mine) for one in BAD_TOKENS if one.reason != "TOKEN_REVOKED"]
    bad += [mine.token({"alg": algorithm, "kid": "new"}) for algorithm in ("none", "RS256")]
    with key_server(key_set(signing_key("ES256"))) as issuer:
        tokens = trust.build(settings("ES256", issuer.url), SystemClock(), None)
        await tokens.load()
    monkeypatch.setattr(KeySetUrl, "read", read)
    async with open_gateway(verifier=tokens.verifier, interceptors=tokens.interceptors) as world:
        await world.add_worker("w1", Script(answer="fine"))
        waiting = asyncio.create_task(refusal(world.channel, GENERATE, bearer(unknown), timeout_s=20))
        assert await asyncio.to_thread(hangs.wait, 10)
        await check_prompt(world.channel, [(GENERATE, bearer(token), b"") for token in bad])
        await answers(world, mine.token())
        assert reason_of(await waiting) == "TOKEN_INVALID"
        goes_on.set()
