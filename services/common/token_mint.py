"""New tokens. Owns: how the mesh's own command makes and signs one, and how a private key is read for it.

Servers never mint. Whoever holds the secret or the private key may.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.common.token_keys import (
    EDDSA,
    ES256,
    HS256,
    RS256,
    KeySetInvalid,
    PublicKey,
    checked_public_key,
    checked_secret,
)

_FAMILIES: tuple[tuple[type, str], ...] = (
    (rsa.RSAPrivateKey, RS256),
    (ec.EllipticCurvePrivateKey, ES256),
    (ed25519.Ed25519PrivateKey, EDDSA),
)
# What RFC 7638 digests, in its order, by `kty`.
_THUMBPRINT_FIELDS = {"RSA": ("e", "kty", "n"), "EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x")}


class KeyUnusable(Exception):
    """A key file cannot sign tokens; the message says why."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key.

    Attributes:
        key: The key itself, of the cryptography library.
        algorithm: The family that it belongs to.
        jwk: Its public half as a JWK, `kid` included: what servers are given.
    """

    key: Any
    algorithm: str
    jwk: dict[str, Any]


def mint(
    secret: str | SigningKey,
    *,
    subject: str,
    scopes: Iterable[str],
    ttl_s: float,
    issuer: str = "interlock",
    audience: str = "interlock",
    now_s: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Returns a new token; for the command line and for tests, which hold the secret anyway.

    Args:
        secret: The HS256 secret, or a private key of another family.
        subject: Whom it is for.
        scopes: What it allows.
        ttl_s: How long it lives, in seconds.
        issuer: Its `iss`.
        audience: Its `aud`.
        now_s: When it is issued, in seconds since the epoch; None: now.
        extra: Further claims, such as `jti` (a random one without it) and `interlock`.

    Raises:
        SecretWeak: The secret is shorter than 32 bytes.
    """
    issued_s = time.time() if now_s is None else now_s
    payload: dict[str, Any] = {
        "sub": subject,
        "scope": " ".join(scopes),
        "iat": int(issued_s),
        "exp": int(issued_s + ttl_s),
        "iss": issuer,
        "aud": audience,
        "jti": secrets.token_hex(16),
        **(extra or {}),
    }
    if isinstance(secret, SigningKey):
        headers = {"kid": secret.jwk["kid"]}
        return jwt.encode(payload, secret.key, algorithm=secret.algorithm, headers=headers)
    return jwt.encode(payload, checked_secret(secret), algorithm=HS256)


def read_signing_key(pem: bytes) -> SigningKey:
    """Reads an unencrypted private key: RSA of 2,048 bits or more, EC on P-256, or Ed25519.

    Raises:
        KeyUnusable: It is none of them.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyUnusable("not a private key in PEM without a password") from None
    algorithm = next((name for kind, name in _FAMILIES if isinstance(key, kind)), None)
    if algorithm is None:
        raise KeyUnusable("neither RSA, nor EC on P-256, nor Ed25519")
    try:
        public = checked_public_key(key.public_key(), algorithm)
    except KeySetInvalid as error:
        raise KeyUnusable(str(error)) from None
    return SigningKey(key, algorithm, public_jwk(public, algorithm))


def public_jwk(key: PublicKey, algorithm: str) -> dict[str, Any]:
    """A public key as a JWK whose `kid` is its RFC 7638 thumbprint: the same wherever it is made."""
    jwk = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key))
    named = {name: jwk[name] for name in _THUMBPRINT_FIELDS[jwk["kty"]]}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).digest()
    key_id = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return {**named, "kid": key_id, "alg": algorithm, "use": "sig"}
