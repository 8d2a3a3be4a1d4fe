"""Tokens that were believed a moment ago. Owns: how long a verified token is not verified again.

A client sends the same token with each request; its signature is as good the second time. What is remembered
is bounded in number and time, and never outlives the token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from services.common.tokens import Claims

# Long enough for a busy client's next request; a token that is taken back is refused this much later at most.
REMEMBERED_S = 1.0
# A token has about 500 bytes: these are some megabytes, and more tenants than one gateway serves in a second.
TOKENS_MAX = 4_096


class Verifier(Protocol):
    """Who believes tokens, or not."""

    def verify(self, token: str) -> Claims:
        """Returns what a token says; raises where it is not to be believed."""
        ...


class TokenCache:
    """A verifier that remembers for a moment what another one has found. Refusals are not remembered.

    Args:
        verifier: Looks at tokens that are not remembered.
        now: The current time in seconds since the epoch; the verifier's own clock.
    """

    def __init__(self, verifier: Verifier, now: Callable[[], float]) -> None:
        self._verifier = verifier
        self._now = now
        self._found: OrderedDict[str, tuple[float, Claims]] = OrderedDict()

    def verify(self, token: str) -> Claims:
        """See `Verifier.verify`."""
        now_s = self._now()
        since_s, claims = self._found.get(token, (0.0, None))
        # A clock that was set back makes the age negative: then nothing is known of it.
        if claims is not None and 0 <= now_s - since_s < REMEMBERED_S and now_s < claims.expires_s:
            return claims
        self._found.pop(token, None)
        claims = self._verifier.verify(token)
        self._found[token] = (now_s, claims)
        if len(self._found) > TOKENS_MAX:
            self._found.popitem(last=False)
        return claims

    def clear(self) -> None:
        """Forgets everything: the next use of each token is verified. For when a token was taken back."""
        self._found.clear()
