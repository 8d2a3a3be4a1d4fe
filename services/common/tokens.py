"""Bearer tokens. Owns: which JWTs are believed, and how the mesh's own command makes one.

A token is a JWT signed with HS256. Required claims: `sub exp iat iss aud`; `scope` is a space separated
list. Refused besides PyJWT's own checks: times that are not numbers, duplicate claims, a `sub` that is
empty, over 256 bytes or holds control characters, a `typ` that is not JWT, a lifetime over the configured
one, and tokens over 8 KiB. Headers that name keys (`jku`, `x5u`, `kid`) are never followed.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from services.common.errors import ScopeMissing, TokenExpired, TokenInvalid, TokenMissing

ALGORITHM = "HS256"

# RFC 7518, section 3.2: a key at least as long as the hash.
SECRET_BYTES_MIN = 32
# Claims of ours fill a few hundred bytes; parsing more only serves an attacker.
TOKEN_BYTES_MAX = 8 * 1024
SUBJECT_BYTES_MAX = 256

SCOPES = ("generate", "models:read", "admin", "priority:system")


class SecretWeak(Exception):
    """The signing secret is too short to be safe."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a believed token says.

    Attributes:
        subject: Who the token was made for; the tenant.
        scopes: What it allows.
        expires_s: When it ends, in seconds since the epoch.
    """

    subject: str
    scopes: frozenset[str]
    expires_s: float

    def require(self, *scopes: str) -> None:
        """Raises ScopeMissing unless the token has at least one of `scopes`."""
        if self.scopes.isdisjoint(scopes):
            raise ScopeMissing(f"The token lacks the scope {' or '.join(repr(scope) for scope in scopes)}.")


class TokenVerifier:
    """Believes tokens of one issuer for one audience.

    Args:
        secret: The HS256 secret, at least 32 bytes.
        issuer: What `iss` must be.
        audience: What `aud` must contain.
        lifetime_max_s: Longest `exp - iat` that is accepted.
        leeway_s: How far the clocks of issuer and server may be apart.
        now: The current time in seconds since the epoch.

    Raises:
        SecretWeak: The secret is shorter than 32 bytes.
    """

    def __init__(
        self,
        secret: str,
        *,
        issuer: str = "interlock",
        audience: str = "interlock",
        lifetime_max_s: int = 86_400,
        leeway_s: int = 30,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._secret = _checked_secret(secret)
        self._issuer = issuer
        self._audience = audience
        self._lifetime_max_s = lifetime_max_s
        self._leeway_s = leeway_s
        self._now = now

    def verify(self, token: str) -> Claims:
        """Returns what the token says.

        Raises:
            TokenInvalid: It breaks a rule; the message names the rule, not the content.
            TokenExpired: Its time is over.
        """
        if len(token) > TOKEN_BYTES_MAX:
            raise TokenInvalid(f"The token is larger than {TOKEN_BYTES_MAX} bytes.")
        _check_unambiguous(token)
        try:
            decoded = jwt.decode_complete(
                token,
                self._secret,
                algorithms=[ALGORITHM],
                issuer=self._issuer,
                audience=self._audience,
                # Times are judged below, against a clock that can be given.
                options={
                    "require": ["sub", "exp", "iat", "iss", "aud"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except jwt.PyJWTError as error:
            raise TokenInvalid(f"The token is not valid: {_rule(error)}.") from None
        except (ValueError, TypeError, RecursionError):
            raise TokenInvalid("The token is not valid: it is not a JWT.") from None
        _check_type(decoded["header"])
        payload = decoded["payload"]
        expires_s = self._check_times(payload)
        return Claims(_subject(payload), _scopes(payload), expires_s)

    def _check_times(self, payload: dict[str, Any]) -> float:
        expires_s, issued_s = _number(payload, "exp"), _number(payload, "iat")
        now_s = self._now()
        if issued_s > now_s + self._leeway_s:
            raise TokenInvalid("The token was issued in the future; check the clocks.")
        if "nbf" in payload and _number(payload, "nbf") > now_s + self._leeway_s:
            raise TokenInvalid("The token is not valid yet.")
        if expires_s - issued_s > self._lifetime_max_s:
            raise TokenInvalid(f"The token lives longer than the {self._lifetime_max_s} s that are allowed.")
        if expires_s <= now_s - self._leeway_s:
            raise TokenExpired("The token has expired; ask for a new one.")
        return expires_s


def mint(
    secret: str,
    *,
    subject: str,
    scopes: Iterable[str],
    ttl_s: float,
    issuer: str = "interlock",
    audience: str = "interlock",
    now_s: float | None = None,
) -> str:
    """Returns a new token; for the command line and for tests, which hold the secret anyway.

    Raises:
        SecretWeak: The secret is shorter than 32 bytes.
    """
    issued_s = time.time() if now_s is None else now_s
    payload = {
        "sub": subject,
        "scope": " ".join(scopes),
        "iat": int(issued_s),
        "exp": int(issued_s + ttl_s),
        "iss": issuer,
        "aud": audience,
    }
    return jwt.encode(payload, _checked_secret(secret), algorithm=ALGORITHM)


def bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """The token of a call: `authorization: Bearer <token>`, or `x-api-key: <token>`.

    Raises:
        TokenMissing: There is none.
    """
    values = {key: value for key, value in metadata if isinstance(value, str)}
    scheme, _, token = values.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if values.get("x-api-key"):
        return values["x-api-key"]
    raise TokenMissing("No token: send `authorization: Bearer <token>`. `interlock token` makes one.")


def _checked_secret(secret: str) -> str:
    if len(secret.encode()) < SECRET_BYTES_MIN:
        raise SecretWeak(f"The JWT secret is shorter than {SECRET_BYTES_MIN} bytes; use a random one.")
    return secret


def _rule(error: jwt.PyJWTError) -> str:
    """What was broken, in words that repeat nothing of the token."""
    if isinstance(error, jwt.InvalidSignatureError):
        return "its signature is not ours"
    if isinstance(error, jwt.InvalidAlgorithmError):
        return f"only {ALGORITHM} is accepted"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"the claim {error.claim!r} is missing"
    if isinstance(error, jwt.InvalidIssuerError):
        return "its issuer is not ours"
    if isinstance(error, jwt.InvalidAudienceError):
        return "it was made for another audience"
    return "it is not a JWT that we understand"


def _check_unambiguous(token: str) -> None:
    """Refuses duplicate claims: two readers of one token could each believe another one."""
    for part in token.split(".")[:2]:
        try:
            raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
            json.loads(raw, object_pairs_hook=_unique)
        except (binascii.Error, UnicodeError, ValueError, RecursionError):
            raise TokenInvalid("The token is not valid: it is not a JWT that we understand.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _check_type(header: dict[str, Any]) -> None:
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":
        raise TokenInvalid("The token is of another type than JWT.")


def _number(payload: dict[str, Any], name: str) -> float:
    value = payload[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise TokenInvalid(f"The claim {name!r} is not a time in seconds.")
    return float(value)


def _subject(payload: dict[str, Any]) -> str:
    subject = payload["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT_BYTES_MAX:
        raise TokenInvalid(f"The claim 'sub' is not a text of 1 to {SUBJECT_BYTES_MAX} bytes.")
    # Lone surrogates count as control characters, so what passes can be encoded.
    if any(unicodedata.category(character).startswith("C") for character in subject):
        raise TokenInvalid("The claim 'sub' holds control characters.")
    if len(subject.encode()) > SUBJECT_BYTES_MAX:
        raise TokenInvalid(f"The claim 'sub' is not a text of 1 to {SUBJECT_BYTES_MAX} bytes.")
    return subject


def _scopes(payload: dict[str, Any]) -> frozenset[str]:
    scope = payload.get("scope", "")
    if not isinstance(scope, str):
        raise TokenInvalid("The claim 'scope' is not a space separated text.")
    return frozenset(scope.split())
