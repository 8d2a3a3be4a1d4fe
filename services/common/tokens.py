"""Bearer tokens. Owns: which JWTs are believed, and how a call carries one.

The family of the signature is the deployment's (`token_keys`), the claims have rules of their own
(`token_claims`), and a token may have been revoked. Headers that name or hold keys (`jku`, `x5u`, `jwk`,
`x5c`) are never followed: a key is known already or it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jwt
from jwt.types import Options

from services.common.errors import InterlockError, TokenInvalid, TokenMissing, TokenRevoked
from services.common.token_cache import Judged, TokenCache
from services.common.token_claims import (
    REQUIRED,
    SCOPES,
    TOKEN_BYTES_MAX,
    Claims,
    TimeRules,
    read_claims,
    read_header,
)
from services.common.token_keys import SecretKey, SecretWeak, TokenKeys
from services.common.token_mint import mint

__all__ = ["SCOPES", "Claims", "SecretWeak", "TokenVerifier", "bearer_token", "mint"]

# Times, ids and texts are judged by our own rules, against a clock that can be given.
_OPTIONS: Options = {
    "require": list(REQUIRED),
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
    "verify_sub": False,
    "verify_jti": False,
}


class TokenVerifier:
    """Believes tokens of one issuer for one audience.

    A token that was found good is not read again while its key is believed and its time is not over; whether
    it was revoked is asked each time.

    Args:
        keys: The HS256 secret, at least 32 bytes; or the keys of another family.
        issuer: What `iss` must be.
        audience: What `aud` must contain.
        lifetime_max_s: Longest `exp - iat` that is accepted.
        leeway_s: How far the clocks of issuer and server may be apart.
        now: The current time in seconds since the epoch.
        is_revoked: Whether a `jti` was revoked.

    Raises:
        SecretWeak: The secret is shorter than 32 bytes.
    """

    def __init__(
        self,
        keys: str | TokenKeys,
        *,
        issuer: str = "interlock",
        audience: str = "interlock",
        lifetime_max_s: int = 86_400,
        leeway_s: int = 30,
        now: Callable[[], float] = time.time,
        is_revoked: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._keys: TokenKeys = SecretKey(keys) if isinstance(keys, str) else keys
        self._issuer = issuer
        self._audience = audience
        self._times = TimeRules(lifetime_max_s, leeway_s)
        self._now = now
        self._is_revoked = is_revoked
        self._cache = TokenCache()

    def verify(self, token: str) -> Claims:
        """Returns what the token says.

        Raises:
            TokenInvalid: It breaks a rule; the message names the rule, not the content.
            TokenExpired: Its time is over.
            TokenRevoked: Somebody took it back.
        """
        claims = self._remembered(token) or self._judge(token)
        if claims.token_id is not None and self._is_revoked(claims.token_id):
            raise TokenRevoked("The token was revoked; ask for a new one.")
        return claims

    def believes(self, metadata: Sequence[tuple[str, str | bytes]], *scopes: str) -> bool:
        """Whether a call's metadata has a good token, with one of `scopes` where some are named.

        What is wrong with another one, `verify` and `Claims.require` say.
        """
        try:
            claims = self.verify(bearer_token(metadata))
            if scopes:
                claims.require(*scopes)
        except InterlockError:
            return False
        return True

    def _remembered(self, token: str) -> Claims | None:
        """What a token says that was found good before and still is."""
        judged = self._cache.find(token) if len(token) <= TOKEN_BYTES_MAX else None
        if judged is None or not self._times.still_holds(judged.claims, judged.judged_s, self._now()):
            return None
        return judged.claims if self._keys.find(judged.key_id) is judged.key else None

    def _judge(self, token: str) -> Claims:
        header = read_header(token)
        # Asked before a key is looked for: a token of another family learns which one is ours.
        if header.get("alg") != self._keys.algorithm:
            raise TokenInvalid(f"The token is not valid: only {self._keys.algorithm} is accepted.")
        key_id, now_s = header.get("kid"), self._now()
        key = self._keys.find(key_id)
        claims = read_claims(self._genuine(token, key), self._times, now_s)
        self._cache.put(token, Judged(key_id, key, claims, now_s))
        return claims

    def _genuine(self, token: str, key: Any) -> dict[str, object]:
        """The payload, once the signature is right and issuer and audience are ours."""
        try:
            decoded: dict[str, object] = jwt.decode(
                token,
                key,
                algorithms=[self._keys.algorithm],
                issuer=self._issuer,
                audience=self._audience,
                options=_OPTIONS,
            )
        except jwt.PyJWTError as error:
            raise TokenInvalid(f"The token is not valid: {_rule(error)}.") from None
        except (ValueError, TypeError, RecursionError):
            raise TokenInvalid("The token is not valid: it is not a JWT.") from None
        return decoded


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


def _rule(error: jwt.PyJWTError) -> str:
    """What was broken, in words that repeat nothing of the token."""
    if isinstance(error, jwt.InvalidSignatureError):
        return "its signature is not ours"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"the claim {error.claim!r} is missing"
    if isinstance(error, jwt.InvalidIssuerError):
        return "its issuer is not ours"
    if isinstance(error, jwt.InvalidAudienceError):
        return "it was made for another audience"
    return "it is not a JWT that we understand"
