"""What a token says. Owns: which claims and headers are believed once the signature is; pure but for JSON.

Knows no key, no library for signatures, and no service: limits are what the token asks for, and the
gateway bounds them.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import ScopeMissing, TokenExpired, TokenInvalid

# Claims of ours fill a few hundred bytes; parsing more only serves an attacker.
TOKEN_BYTES_MAX = 8 * 1024
SUBJECT_BYTES_MAX = 256
# As long as a subject: issuers use UUIDs and digests. It is kept for each token that is revoked.
TOKEN_ID_BYTES_MAX = 256
WEIGHT_MAX = 100

SCOPES = ("generate", "models:read", "admin", "priority:system")
REQUIRED = ("sub", "exp", "iat", "iss", "aud")
LIMITS_CLAIM = "interlock"

# Three parts without padding; the library would take `=` at their ends, and one token have two spellings.
# A missing signature is judged with the algorithm.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_UNREADABLE = "The token is not valid: it is not a JWT that we understand."


@dataclass(frozen=True, slots=True)
class AskedLimits:
    """What the `interlock` claim asks for; None: it does not say.

    Attributes:
        tokens_per_minute: Tokens of prompt and output, at least 1.
        concurrency: Requests that run at once, of each model, at least 1.
        weight: Share in the queue, 1 to 100.
    """

    tokens_per_minute: int | None = None
    concurrency: int | None = None
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a believed token says.

    Attributes:
        subject: Who the token was made for; the tenant.
        scopes: What it allows.
        expires_s: When it ends, in seconds since the epoch.
        token_id: Its `jti`, by which it can be revoked; None: it has none.
        limits: What it asks for.
    """

    subject: str
    scopes: frozenset[str]
    expires_s: float
    token_id: str | None = None
    limits: AskedLimits = AskedLimits()

    def require(self, *scopes: str) -> None:
        """Raises ScopeMissing unless the token has at least one of `scopes`."""
        if self.scopes.isdisjoint(scopes):
            raise ScopeMissing(f"The token lacks the scope {' or '.join(repr(scope) for scope in scopes)}.")


@dataclass(frozen=True, slots=True)
class TimeRules:
    """Which times are believed.

    Attributes:
        lifetime_max_s: Longest `exp - iat`.
        leeway_s: How far the clocks of issuer and server may be apart.
    """

    lifetime_max_s: int = 86_400
    leeway_s: int = 30

    def check(self, payload: Mapping[str, Any], now_s: float) -> float:
        """Returns when the token ends.

        Raises:
            TokenInvalid: A time is none, lies in the future, or the token lives too long.
            TokenExpired: Its time is over.
        """
        expires_s, issued_s = _number(payload, "exp"), _number(payload, "iat")
        if issued_s > now_s + self.leeway_s:
            raise TokenInvalid("The token was issued in the future; check the clocks.")
        if "nbf" in payload and _number(payload, "nbf") > now_s + self.leeway_s:
            raise TokenInvalid("The token is not valid yet.")
        if expires_s - issued_s > self.lifetime_max_s:
            raise TokenInvalid(f"The token lives longer than the {self.lifetime_max_s} s that are allowed.")
        if expires_s <= now_s - self.leeway_s:
            raise TokenExpired("The token has expired; ask for a new one.")
        return expires_s

    def still_holds(self, claims: Claims, judged_s: float, now_s: float) -> bool:
        """Whether what was believed at `judged_s` is believed now: only an end comes with time."""
        return judged_s <= now_s and claims.expires_s > now_s - self.leeway_s


def read_header(token: str) -> dict[str, Any]:
    """Returns the header of a well-formed token, whose signature nobody has looked at yet.

    Raises:
        TokenInvalid: It is too large, no JWT, says anything twice, or wants what we do not have.
    """
    if len(token) > TOKEN_BYTES_MAX:
        raise TokenInvalid(f"The token is larger than {TOKEN_BYTES_MAX} bytes.")
    if not _COMPACT.fullmatch(token):
        raise TokenInvalid(_UNREADABLE)
    header, _ = (_read_object(part) for part in token.split(".")[:2])
    if not isinstance(header, dict):
        raise TokenInvalid(_UNREADABLE)
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":
        raise TokenInvalid("The token is of another type than JWT.")
    if "crit" in header:
        raise TokenInvalid("The token needs an extension that is not known here.")
    if not isinstance(header.get("kid", ""), str):
        raise TokenInvalid("The header 'kid' is not a text.")
    return header


def read_claims(payload: Mapping[str, Any], times: TimeRules, now_s: float) -> Claims:
    """Returns what the payload of a genuine token says.

    Raises:
        TokenInvalid: A claim breaks its rule; the message names the claim, not its content.
        TokenExpired: Its time is over.
    """
    expires_s = times.check(payload, now_s)
    token_id = _text(payload, "jti", TOKEN_ID_BYTES_MAX) if "jti" in payload else None
    subject = _text(payload, "sub", SUBJECT_BYTES_MAX)
    return Claims(subject, _scopes(payload), expires_s, token_id, _limits(payload))


def is_name(text: str, bytes_max: int) -> bool:
    """Whether `text` has 1 to `bytes_max` bytes and no control character."""
    # Lone surrogates count as control characters, so what passes can be encoded.
    if any(unicodedata.category(character).startswith("C") for character in text[: bytes_max + 1]):
        return False
    return 0 < len(text) <= bytes_max and len(text.encode()) <= bytes_max


def _read_object(part: str) -> object:
    """A part of the token as JSON; two readers of one token must not each believe another claim."""
    try:
        raw = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
        return json.loads(raw, object_pairs_hook=_unique)
    except (binascii.Error, UnicodeError, ValueError, RecursionError):
        raise TokenInvalid(_UNREADABLE) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _number(payload: Mapping[str, Any], name: str) -> float:
    value = payload[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise TokenInvalid(f"The claim {name!r} is not a time in seconds.")
    return float(value)


def _text(payload: Mapping[str, Any], name: str, bytes_max: int) -> str:
    value = payload[name]
    if not isinstance(value, str) or not is_name(value, bytes_max):
        raise TokenInvalid(
            f"The claim {name!r} is not a text of 1 to {bytes_max} bytes without control characters."
        )
    return value


def _scopes(payload: Mapping[str, Any]) -> frozenset[str]:
    scope = payload.get("scope", "")
    if not isinstance(scope, str):
        raise TokenInvalid("The claim 'scope' is not a space separated text.")
    return frozenset(scope.split())


def _limits(payload: Mapping[str, Any]) -> AskedLimits:
    asked = payload.get(LIMITS_CLAIM, {})
    if not isinstance(asked, dict):
        raise TokenInvalid(f"The claim {LIMITS_CLAIM!r} is not an object.")
    # Fields that are not known here are an issuer's for a later version of ours, so they are let pass.
    return AskedLimits(
        tokens_per_minute=_whole(asked, "tokens_per_minute", most=None),
        concurrency=_whole(asked, "concurrency", most=None),
        weight=_whole(asked, "weight", most=WEIGHT_MAX),
    )


def _whole(asked: Mapping[str, Any], name: str, *, most: int | None) -> int | None:
    if name not in asked:
        return None
    value = asked[name]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        bounds = "of at least 1" if most is None else f"from 1 to {most}"
        raise TokenInvalid(f"The claim '{LIMITS_CLAIM}.{name}' is not a whole number {bounds}.")
    return int(value)
