"""A token that was found good is not read again, and is never believed for longer because of it."""

from __future__ import annotations

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import TokenExpired, TokenInvalid, TokenRevoked
from services.common.token_cache import Judged, TokenCache
from services.common.token_claims import Claims
from services.common.token_keys import EDDSA, KeySet, PublishedKeys
from services.common.tokens import TokenVerifier, mint

SECRET = "a-secret-of-at-least-thirty-two-bytes"
NOW_S = 1_800_000_000.0


class Clock:
    """A clock that is set."""

    now_s = NOW_S

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """The time of the verifier."""
    return Clock()


def test_a_good_token_is_read_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call gets the same claims without a look at the signature; another token gets its own."""
    verifier = TokenVerifier(SECRET, now=clock)
    tokens = [mint(SECRET, subject=name, scopes=["generate"], ttl_s=60, now_s=NOW_S) for name in "ab"]
    first = verifier.verify(tokens[0])
    with monkeypatch.context() as patch:
        patch.setattr(jwt, "decode", _never)
        assert verifier.verify(tokens[0]) is first
    assert verifier.verify(tokens[1]).subject == "b"


def test_a_bad_token_is_judged_each_time(clock: Clock) -> None:
    """One whose payload was exchanged under the signature of a good one, before and after the good one."""
    verifier = TokenVerifier(SECRET, now=clock)
    good, other = (mint(SECRET, subject=name, scopes=["generate"], ttl_s=60, now_s=NOW_S) for name in "ab")
    header, _, signature = good.split(".")
    forged = f"{header}.{other.split('.')[1]}.{signature}"
    for _ in range(2):
        with pytest.raises(TokenInvalid):
            verifier.verify(forged)
        assert verifier.verify(good).subject == "a"


def test_time_ends_what_was_believed(clock: Clock) -> None:
    """At its end, leeway included, and also when the clock is put back to before it was issued."""
    verifier = TokenVerifier(SECRET, now=clock, leeway_s=30)
    token = mint(SECRET, subject="a", scopes=["generate"], ttl_s=60, now_s=NOW_S)
    verifier.verify(token)
    clock.now_s = NOW_S + 89
    verifier.verify(token)
    clock.now_s = NOW_S + 90
    with pytest.raises(TokenExpired):
        verifier.verify(token)
    clock.now_s = NOW_S - 31
    with pytest.raises(TokenInvalid):
        verifier.verify(token)


def test_a_revocation_counts_at_once(clock: Clock) -> None:
    """It is asked each time, whatever is remembered."""
    revoked: set[str] = set()
    verifier = TokenVerifier(SECRET, now=clock, is_revoked=revoked.__contains__)
    token = mint(SECRET, subject="a", scopes=["generate"], ttl_s=60, now_s=NOW_S)
    token_id = verifier.verify(token).token_id
    assert token_id is not None
    revoked.add(token_id)
    with pytest.raises(TokenRevoked):
        verifier.verify(token)
    revoked.clear()
    verifier.verify(token)


def test_a_key_that_is_withdrawn_takes_its_tokens_along(clock: Clock) -> None:
    """Also where another key takes over its name."""
    keys, private = PublishedKeys(EDDSA), [Ed25519PrivateKey.generate() for _ in range(2)]
    verifier = TokenVerifier(keys, now=clock)
    claims: dict[str, Any] = {
        "sub": "a",
        "iat": NOW_S,
        "exp": NOW_S + 60,
        "iss": "interlock",
        "aud": "interlock",
    }
    token = jwt.encode(claims, private[0], algorithm=EDDSA, headers={"kid": "k"})
    keys.replace(KeySet({"k": private[0].public_key()}))
    verifier.verify(token)
    keys.replace(KeySet({"k": private[1].public_key()}))
    with pytest.raises(TokenInvalid):
        verifier.verify(token)
    keys.replace(KeySet({"other": private[0].public_key()}))
    with pytest.raises(TokenInvalid):
        verifier.verify(token)


def test_it_is_bounded_and_forgets_what_is_not_used() -> None:
    """The token that was asked for last stays."""
    cache = TokenCache(tokens_max=2)
    judged = Judged(None, "key", Claims("a", frozenset(), NOW_S), NOW_S)
    cache.put("a", judged)
    cache.put("b", judged)
    assert cache.find("a") is judged
    cache.put("c", judged)
    assert len(cache) == 2
    assert cache.find("b") is None
    assert cache.find("a") is judged


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("The token was read again.")
