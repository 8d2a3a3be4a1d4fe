"""The same rules for every family of signatures, and keys that must never pass for another's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Code, InterlockError, TokenInvalid
from services.common.token_claims import AskedLimits
from services.common.token_keys import (
    ALGORITHMS,
    KEYS_MAX,
    KeySetInvalid,
    PublishedKeys,
    SecretWeak,
    read_key_set,
)
from services.common.token_mint import KeyUnusable, mint, public_jwk, read_signing_key
from services.common.tokens import TokenVerifier
from tests.fixtures.token_forge import (
    BAD_TOKENS,
    REVOKED_ID,
    SECRET,
    WEAK_RSA,
    BadToken,
    Signer,
    key_set,
    private_pem,
    public_pem,
    signer,
    signing_key,
    weak_jwk,
)

PUBLIC = ("RS256", "ES256", "EdDSA")


def published(algorithm: str, *documents: Any) -> PublishedKeys:
    """Keys as a server has read them; the family's first one unless given."""
    keys = PublishedKeys(algorithm)
    keys.replace(read_key_set(key_set(*(documents or (signing_key(algorithm),))), algorithm))
    return keys


def verifier(algorithm: str) -> TokenVerifier:
    """A deployment of a family, with one revoked id."""
    keys = SECRET if algorithm == "HS256" else published(algorithm)
    return TokenVerifier(keys, is_revoked=lambda token_id: token_id == REVOKED_ID)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_of_the_family_is_believed(algorithm: str) -> None:
    """Subject, scopes, id and limits are what it says; `nbf` in the past and a list of audiences are fine."""
    token = signer(algorithm).token(
        jti="one", nbf=1, aud=["x", "interlock"], interlock={"weight": 3, "concurrency": 2, "later": "x"}
    )
    claims = verifier(algorithm).verify(token)
    assert (claims.subject, claims.token_id) == ("alice", "one")
    assert claims.limits == AskedLimits(None, 2, 3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", BAD_TOKENS, ids=lambda bad: bad.name)
def test_a_bad_token_is_refused_by_name(bad: BadToken, algorithm: str) -> None:
    """UNAUTHENTICATED with the reason and the words that are listed for it, and nothing of the token."""
    token = bad.make(signer(algorithm))
    with pytest.raises(InterlockError) as caught:
        verifier(algorithm).verify(token)
    assert (caught.value.code, caught.value.reason) == (Code.UNAUTHENTICATED, bad.reason)
    assert bad.words in caught.value.message
    assert "alice" not in caught.value.message


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_no_mutation_of_a_token_is_believed(algorithm: str, data: st.DataObject) -> None:
    """Whatever is changed, inserted or cut: refused as UNAUTHENTICATED, and nothing else is raised."""
    token = signer(algorithm).token()
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, min(len(token), start + 8)))
    alphabet = st.one_of(st.sampled_from("ABab01-_.=!\n é\ud800"), st.characters())
    mutated = token[:start] + data.draw(st.text(alphabet, max_size=8)) + token[end:]
    if mutated == token:
        return
    with pytest.raises(InterlockError) as caught:
        verifier(algorithm).verify(mutated)
    assert caught.value.code is Code.UNAUTHENTICATED


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    name=st.sampled_from(["sub", "exp", "iat", "nbf", "iss", "aud", "scope", "jti", "interlock"]),
    value=_JSON,
    header=st.dictionaries(st.sampled_from(["kid", "typ", "jku", "x5u", "crit", "b64", "cty"]), _JSON),
)
def test_no_claim_breaks_the_rules_themselves(name: str, value: Any, header: dict[str, Any]) -> None:
    """A genuine token with anything in any claim and header is believed or refused, never a crash."""
    now: dict[str, Any] = {"sub": "a", "iat": 10, "exp": 600, "iss": "interlock", "aud": "interlock"}
    token = Signer("HS256", SECRET).raw(
        json.dumps({"alg": "HS256"} | header), json.dumps(now | {name: value})
    )
    try:
        claims = TokenVerifier(SECRET, now=lambda: 100.0).verify(token)
    except InterlockError as error:
        code = error.code
    else:
        code = Code.UNAUTHENTICATED
        assert 0 < len(claims.subject.encode()) <= 256
        assert claims.expires_s <= 100 + 30 + 86_400
    assert code is Code.UNAUTHENTICATED


def test_a_kid_opens_nothing(tmp_path: Any) -> None:
    """A `kid` with a path, even of a file with the key in it, is a name that nobody has."""
    file = tmp_path / "key.pem"
    file.write_bytes(public_pem(signing_key("RS256")))
    for kid in (str(file), "../../etc/passwd", "file:///etc/passwd", "x'; DROP TABLE keys", ""):
        token = signer("RS256").token({"kid": kid})
        with pytest.raises(TokenInvalid, match="not known here"):
            verifier("RS256").verify(token)


def test_keys_are_found_by_kid_and_without_one_if_there_is_only_one() -> None:
    """With two keys a token must name its own; with one it need not."""
    first, second = signing_key("ES256", 0), signing_key("ES256", 1)
    unnamed = Signer("ES256", first.key).token()
    TokenVerifier(published("ES256", first)).verify(unnamed)
    nameless = {name: value for name, value in first.jwk.items() if name != "kid"}
    TokenVerifier(published("ES256", nameless)).verify(unnamed)
    both = TokenVerifier(published("ES256", first, second))
    both.verify(signer("ES256", 0).token())
    both.verify(signer("ES256", 1).token())
    with pytest.raises(TokenInvalid, match="not exactly one"):
        both.verify(unnamed)
    with pytest.raises(TokenInvalid, match="signature"):
        both.verify(Signer("ES256", first.key, {"kid": second.jwk["kid"]}).token())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use": "enc"}, "signatures"),
        ({"key_ops": ["encrypt"]}, "signatures"),
        ({"key_ops": 7}, "signatures"),
        ({"alg": "RS512"}, "not for RS256"),
        ({"d": "AAAA"}, "not public"),
        ({"kty": "oct", "k": "c2VjcmV0"}, "not public"),
        ({"kty": "EC"}, "not a key of RS256"),
        ({"kty": None}, "not a key of RS256"),
        ({"n": "AQAB"}, "not a key of RS256|bits"),
        ({"n": 7}, "not a key of RS256"),
        ({"e": ""}, "not a key of RS256"),
        ({"kid": 7}, "kid"),
        ({"kid": "x" * 300}, "kid"),
        (weak_jwk(), "1024 bits"),
    ],
    ids=range(14),
)
def test_unusable_keys_are_skipped_with_a_reason(change: dict[str, Any], words: str) -> None:
    """The others of the set serve."""
    good = signing_key("RS256")
    found = read_key_set(key_set({**good.jwk, "kid": "bad"} | change, good), "RS256")
    assert list(found.by_id) == [good.jwk["kid"]]
    (reason,) = found.skipped
    assert any(word in reason for word in words.split("|"))


@pytest.mark.parametrize("algorithm", PUBLIC)
def test_keys_of_other_families_and_doubles_are_skipped(algorithm: str) -> None:
    """One set may serve several deployments; of two keys with one name the first counts."""
    keys = [signing_key(family) for family in PUBLIC]
    found = read_key_set(key_set(*keys, *keys, 7), algorithm)  # type: ignore[arg-type]
    assert list(found.by_id) == [signing_key(algorithm).jwk["kid"]]
    assert len(found.skipped) == 6


def test_a_key_file_never_is_a_secret() -> None:
    """As the secret of HS256 a key's file stops the start."""
    for pem in (public_pem(signing_key("RS256")), private_pem("EdDSA"), b"ssh-rsa " + b"A" * 64):
        with pytest.raises(SecretWeak, match="key file"):
            TokenVerifier(pem.decode())


@pytest.mark.parametrize(
    "document", [b"", b"{", b"[]", b"7", b'{"keys": {}}', b'{"key": []}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_key_set_is_told_so(document: bytes) -> None:
    """A document of another shape holds no keys."""
    with pytest.raises(KeySetInvalid):
        read_key_set(document, "RS256")
    with pytest.raises(KeySetInvalid, match="at most"):
        read_key_set(key_set(*[{}] * (KEYS_MAX + 1)), "RS256")


@pytest.mark.parametrize("algorithm", PUBLIC)
def test_a_private_key_mints_for_its_family(algorithm: str) -> None:
    """The command's key file, its JWK set and a server agree."""
    token = mint(signing_key(algorithm), subject="alice", scopes=["admin"], ttl_s=60)
    claims = verifier(algorithm).verify(token)
    assert (claims.subject, *claims.scopes) == ("alice", "admin")
    assert claims.token_id


def pem_of(key: Any) -> bytes:
    """A private key as a file has it."""
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"secret",
        public_pem(signing_key("EdDSA")),
        pem_of(WEAK_RSA),
        pem_of(ec.generate_private_key(ec.SECP384R1())),
        pem_of(ed448.Ed448PrivateKey.generate()),
    ],
    ids=["empty", "text", "public", "weak", "P-384", "Ed448"],
)
def test_other_files_sign_nothing(pem: bytes) -> None:
    """Public, weak and foreign keys are refused with a reason."""
    with pytest.raises(KeyUnusable):
        read_signing_key(pem)


def test_a_thumbprint_is_the_standards() -> None:
    """The `kid` of RFC 7638's own example is the one in the RFC."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCi"
        "FV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb"
        "9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls"
        "1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    found = read_key_set(key_set({"kty": "RSA", "n": modulus, "e": "AQAB"}), "RS256")
    (key,) = found.unnamed
    assert public_jwk(key, "RS256")["kid"] == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
