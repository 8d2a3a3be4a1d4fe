from __future__ import annotations

import pytest

from services.common.errors import TokenExpired
from services.common.token_cache import REMEMBERED_S, TOKENS_MAX, TokenCache
from services.common.tokens import Claims


class FakeVerifier:
    """Believes every token but `bad`, and counts."""

    def __init__(self, expires_s: float = 1_000.0) -> None:
        self.asked: list[str] = []
        self._expires_s = expires_s

    def verify(self, token: str) -> Claims:
        """Claims named after the token."""
        self.asked.append(token)
        if token == "bad":
            raise TokenExpired("no")
        return Claims(token, frozenset(), self._expires_s)


def test_a_token_is_verified_once_until_it_is_forgotten() -> None:
    """The second use within the time costs nothing; after it, the verifier is asked again."""
    now_s = [100.0]
    verifier = FakeVerifier()
    cache = TokenCache(verifier, lambda: now_s[0])
    assert cache.verify("a").subject == cache.verify("a").subject == "a"
    assert verifier.asked == ["a"]
    now_s[0] += REMEMBERED_S
    cache.verify("a")
    assert verifier.asked == ["a", "a"]


def test_a_token_is_not_believed_past_its_end() -> None:
    """What is remembered ends with the token."""
    now_s = [100.0]
    verifier = FakeVerifier(expires_s=100.5)
    cache = TokenCache(verifier, lambda: now_s[0])
    cache.verify("a")
    now_s[0] = 100.5
    cache.verify("a")
    assert verifier.asked == ["a", "a"]


def test_a_clock_that_goes_back_and_a_clear_forget() -> None:
    """Neither extends what was found."""
    now_s = [100.0]
    verifier = FakeVerifier()
    cache = TokenCache(verifier, lambda: now_s[0])
    cache.verify("a")
    now_s[0] = 50.0
    cache.verify("a")
    cache.clear()
    cache.verify("a")
    assert verifier.asked == ["a", "a", "a"]


def test_a_refusal_is_not_remembered() -> None:
    """A token that is refused is looked at each time."""
    verifier = FakeVerifier()
    cache = TokenCache(verifier, lambda: 100.0)
    for _ in range(2):
        with pytest.raises(TokenExpired):
            cache.verify("bad")
    assert verifier.asked == ["bad", "bad"]


def test_it_is_bounded_and_drops_the_oldest() -> None:
    """One token more than the bound: the first one is verified again, the last is not."""
    verifier = FakeVerifier()
    cache = TokenCache(verifier, lambda: 100.0)
    for number in range(TOKENS_MAX + 1):
        cache.verify(str(number))
    cache.verify(str(TOKENS_MAX))
    cache.verify("0")
    assert verifier.asked[TOKENS_MAX + 1 :] == ["0"]
