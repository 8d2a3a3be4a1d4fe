"""Which tokens are believed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest

from services.common.errors import ScopeMissing, TokenExpired, TokenInvalid, TokenMissing
from services.common.tokens import SecretWeak, TokenVerifier, bearer_token, mint

SECRET = "a-secret-of-at-least-thirty-two-bytes"
NOW_S = 1_800_000_000.0
CLAIMS = {
    "sub": "alice",
    "iat": NOW_S,
    "exp": NOW_S + 600,
    "iss": "interlock",
    "aud": "interlock",
    "scope": "generate models:read",
}


def verifier() -> TokenVerifier:
    """The verifier that the cases below meet."""
    return TokenVerifier(SECRET, now=lambda: NOW_S)


def signed(claims: dict[str, Any], **headers: Any) -> str:
    """A token with these claims, properly signed."""
    return jwt.encode(claims, SECRET, algorithm="HS256", headers=headers or None)


def raw(header: str, payload: str) -> str:
    """A properly signed token around any text."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    body = f"{encode(header.encode())}.{encode(payload.encode())}"
    return f"{body}.{encode(hmac.digest(SECRET.encode(), body.encode(), hashlib.sha256))}"


def test_a_minted_token_is_believed() -> None:
    """What the command line makes, the servers accept, with subject and scopes."""
    token = mint(SECRET, subject="alice", scopes=["generate", "admin"], ttl_s=60, now_s=NOW_S)
    claims = verifier().verify(token)
    assert claims.subject == "alice"
    assert claims.scopes == {"generate", "admin"}
    claims.require("models:read", "generate")
    with pytest.raises(ScopeMissing, match="priority:system"):
        claims.require("priority:system")


@pytest.mark.parametrize("name", ["sub", "exp", "iat", "iss", "aud"])
def test_each_required_claim_is_required(name: str) -> None:
    """A token without one of them is refused."""
    claims = {key: value for key, value in CLAIMS.items() if key != name}
    with pytest.raises(TokenInvalid):
        verifier().verify(signed(claims))


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "someone"},
        {"aud": "elsewhere"},
        {"iat": NOW_S + 3600},
        {"nbf": NOW_S + 3600},
        {"exp": NOW_S + 3_153_600_000},
        {"exp": str(NOW_S + 600)},
        {"iat": True},
        {"exp": float("1e300")},
        {"sub": ""},
        {"sub": "a\nb"},
        {"sub": "a\u202eb"},
        {"sub": "x" * 257},
        {"sub": "é" * 129},
        {"sub": "\ud800"},
        {"sub": 7},
        {"scope": ["generate"]},
    ],
    ids=str,
)
def test_each_claim_rule_refuses_its_breach(change: dict[str, Any]) -> None:
    """One breach each, in a token that is right in everything else."""
    payload = json.dumps(CLAIMS | change)
    with pytest.raises(TokenInvalid):
        verifier().verify(raw('{"alg":"HS256","typ":"JWT"}', payload))


def test_an_expired_token_says_so_after_the_leeway() -> None:
    """Thirty seconds past its end it is still believed, afterwards it is expired."""
    verifier().verify(signed(CLAIMS | {"iat": NOW_S - 600, "exp": NOW_S - 29}))
    with pytest.raises(TokenExpired):
        verifier().verify(signed(CLAIMS | {"iat": NOW_S - 600, "exp": NOW_S - 31}))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "....",
        raw('{"alg":"none"}', json.dumps(CLAIMS)),
        raw('{"alg":"RS256"}', json.dumps(CLAIMS)),
        raw('{"alg":"HS256","typ":"logout+jwt"}', json.dumps(CLAIMS)),
        raw('{"alg":"HS256","typ":7}', json.dumps(CLAIMS)),
        raw('{"alg":"HS256"}', json.dumps(CLAIMS)[:-1] + ', "sub": "mallory"}'),
        raw('{"alg":"HS256"}', "[1]"),
        raw('{"alg":"HS256"}', "{" * 4000),
        raw('{"alg":"HS256","crit":["x"]}', json.dumps(CLAIMS)),
        jwt.encode(CLAIMS, SECRET.upper(), algorithm="HS256"),
        jwt.encode(CLAIMS, SECRET * 2, algorithm="HS512"),
        signed(CLAIMS | {"padding": "x" * 8192}),
        signed(CLAIMS) + "x" * 1_000_000,
    ],
    ids=range(15),
)
def test_what_is_no_token_of_ours_is_refused(token: str) -> None:
    """Unsigned, wrongly signed, ambiguous, malformed, foreign and huge tokens alike."""
    with pytest.raises(TokenInvalid):
        verifier().verify(token)


def test_headers_that_name_keys_are_not_followed() -> None:
    """`jku`, `x5u` and a `kid` with a path change nothing: our secret decides."""
    token = signed(CLAIMS, jku="http://localhost/keys", x5u="http://localhost/x", kid="../../etc/passwd")
    assert verifier().verify(token).subject == "alice"


def test_a_weak_secret_stops_the_start() -> None:
    """31 bytes are too few to sign or to verify with."""
    with pytest.raises(SecretWeak):
        TokenVerifier("x" * 31)
    with pytest.raises(SecretWeak):
        mint("x" * 31, subject="a", scopes=[], ttl_s=1)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ((("authorization", "Bearer abc"),), "abc"),
        ((("authorization", "bearer  abc "),), "abc"),
        ((("x-api-key", "abc"),), "abc"),
    ],
)
def test_the_token_is_found_in_either_header(metadata: tuple[tuple[str, str], ...], expected: str) -> None:
    """gRPC and HTTP clients send `authorization`, some SDKs `x-api-key`."""
    assert bearer_token(metadata) == expected


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Basic abc"),), (("authorization", "Bearer "),), (("x-api-key", ""),)]
)
def test_a_call_without_a_token_is_told_how_to_get_one(metadata: tuple[tuple[str, str], ...]) -> None:
    """Nothing, another scheme and an empty token are all missing tokens."""
    with pytest.raises(TokenMissing, match="interlock token"):
        bearer_token(metadata)
