"""Keys that tokens are checked with. Owns: the four families, which keys are strong enough, and JWK sets.

A deployment has one family. A key of one never serves another: a public key cannot become the secret of an
HMAC, whatever a token's header says. Must not know: where keys come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.common.errors import TokenInvalid

HS256, RS256, ES256, EDDSA = "HS256", "RS256", "ES256", "EdDSA"
ALGORITHMS = (HS256, RS256, ES256, EDDSA)

# RFC 7518, section 3.2: a key at least as long as the hash.
SECRET_BYTES_MIN = 32
# RFC 7518, section 3.3. A longer key than the upper bound would only make each check slow.
RSA_BITS_MIN, RSA_BITS_MAX = 2_048, 8_192
# Issuers publish two or three keys; a set with more of them is not a set of signing keys.
KEYS_MAX = 64
KEY_ID_CHARS_MAX = 256

_PEM = re.compile(r"-----BEGIN |^(ssh|ecdsa)-")

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class SecretWeak(Exception):
    """The signing secret is too short to be safe, or is a key of another kind."""


class KeySetInvalid(Exception):
    """A document is no set of JWKs; the message says why and repeats nothing of it."""


class TokenKeys(Protocol):
    """The keys of one family."""

    @property
    def algorithm(self) -> str:
        """The one `alg` that tokens may have."""
        ...

    def find(self, key_id: str | None) -> Any:
        """The key for a token's `kid`; nothing is fetched or opened for it.

        Raises:
            TokenInvalid: There is none.
        """
        ...


class SecretKey:
    """The HS256 secret of the mesh; what a token says about keys changes nothing.

    Raises:
        SecretWeak: It is shorter than 32 bytes, or a key of another family.
    """

    algorithm = HS256

    def __init__(self, secret: str) -> None:
        self._secret = checked_secret(secret)

    def find(self, key_id: str | None) -> str:
        """See `TokenKeys.find`."""
        del key_id
        return self._secret


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys of one document.

    Attributes:
        by_id: Keys that have a `kid`.
        unnamed: Keys without one.
        skipped: Why each of the others was left out; repeats nothing of a key.
    """

    by_id: Mapping[str, PublicKey] = field(default_factory=dict)
    unnamed: tuple[PublicKey, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.by_id) + len(self.unnamed)


class PublishedKeys:
    """The public keys of an issuer, as last read; whoever reads them puts them here.

    Args:
        algorithm: `RS256`, `ES256` or `EdDSA`.
    """

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._keys = KeySet()

    def replace(self, keys: KeySet) -> None:
        """Believes these keys and no others from now on."""
        self._keys = keys

    def knows(self, key_id: str | None) -> bool:
        """Whether a token with this `kid` could be judged."""
        return len(self._keys) == 1 if key_id is None else key_id in self._keys.by_id

    def find(self, key_id: str | None) -> PublicKey:
        """See `TokenKeys.find`. The only key judges tokens without a `kid`."""
        keys = self._keys
        if not self.knows(key_id):
            told = (
                "no key, and there is not exactly one" if key_id is None else "a key that is not known here"
            )
            raise TokenInvalid(f"The token is not valid: it names {told}.")
        return (*keys.by_id.values(), *keys.unnamed)[0] if key_id is None else keys.by_id[key_id]


def checked_secret(secret: str) -> str:
    """Returns `secret` once it may sign HS256 tokens. Raises SecretWeak."""
    if len(secret.encode()) < SECRET_BYTES_MIN:
        raise SecretWeak(f"The JWT secret is shorter than {SECRET_BYTES_MIN} bytes; use a random one.")
    if _PEM.search(secret):
        raise SecretWeak("The JWT secret is a key file's content; HS256 wants random bytes that are secret.")
    return secret


def read_key_set(document: bytes, algorithm: str) -> KeySet:
    """Returns the keys of a JWK set that can check tokens of `algorithm`; the others are named in `skipped`.

    Raises:
        KeySetInvalid: It is no JWK set at all.
    """
    try:
        content = json.loads(document)
        found = content["keys"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise KeySetInvalid('not a JWK set: expected {"keys": [...]}') from None
    if not isinstance(found, list) or len(found) > KEYS_MAX:
        raise KeySetInvalid(f"not a JWK set of at most {KEYS_MAX} keys")
    by_id: dict[str, PublicKey] = {}
    unnamed: list[PublicKey] = []
    skipped: list[str] = []
    for number, entry in enumerate(found):
        try:
            key_id, key = _read_key(entry, algorithm)
        except KeySetInvalid as reason:
            skipped.append(f"key {number}: {reason}")
            continue
        if key_id is None:
            unnamed.append(key)
        elif by_id.setdefault(key_id, key) is not key:
            skipped.append(f"key {number}: another key has the same kid")
    return KeySet(MappingProxyType(by_id), tuple(unnamed), tuple(skipped))


def _read_key(entry: object, algorithm: str) -> tuple[str | None, PublicKey]:
    """One key with its `kid`. Raises KeySetInvalid where it is not for us."""
    if not isinstance(entry, dict):
        raise KeySetInvalid("not an object")
    key_id = entry.get("kid")
    if key_id is not None and not (isinstance(key_id, str) and 0 < len(key_id) <= KEY_ID_CHARS_MAX):
        raise KeySetInvalid(f"its kid is not a text of 1 to {KEY_ID_CHARS_MAX} characters")
    if entry.get("kty") == "oct" or "d" in entry:
        raise KeySetInvalid("it is not public: who can read it can sign")
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise KeySetInvalid("it is not for signatures")
    if entry.get("alg", algorithm) != algorithm:
        raise KeySetInvalid(f"it is not for {algorithm}")
    try:
        key = jwt.PyJWK(entry, algorithm=algorithm).key
    # The library lets its own and cryptography's errors through, and some of Python's.
    except (jwt.PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError, AttributeError):
        raise KeySetInvalid(f"it is not a key of {algorithm}") from None
    return key_id, checked_public_key(key, algorithm)


def checked_public_key(key: object, algorithm: str) -> PublicKey:
    """Returns `key` once it is a strong one of the family. Raises KeySetInvalid."""
    match algorithm, key:
        case "RS256", rsa.RSAPublicKey(key_size=bits):
            if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
                raise KeySetInvalid(f"{bits} bits; RSA keys have {RSA_BITS_MIN} to {RSA_BITS_MAX} here")
            return key
        case "ES256", ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return key
        case "EdDSA", ed25519.Ed25519PublicKey():
            return key
    raise KeySetInvalid(f"it is not a key of {algorithm}")
