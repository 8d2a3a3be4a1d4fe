"""Tokens that were found good. Owns: which are remembered, for how long, and how many.

Only digests are kept, so that what lies in memory is of no use to anybody. It judges no token: what it
returns was judged once, with a key that must still be believed, and is only as good as the rules that time
and revocation add, which its caller asks each time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from services.common.token_claims import Claims

# Every caller of a large deployment has one or two; an entry takes half a kilobyte.
TOKENS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Judged:
    """A token that was found good.

    Attributes:
        key_id: The `kid` that it names.
        key: What its signature was checked with.
        claims: What it says.
        judged_s: When that was, in seconds since the epoch.
    """

    key_id: str | None
    key: Any
    claims: Claims
    judged_s: float


class TokenCache:
    """Good tokens by their SHA-256, the least recently used given up first."""

    def __init__(self, tokens_max: int = TOKENS_MAX) -> None:
        self._tokens_max = tokens_max
        self._judged: OrderedDict[bytes, Judged] = OrderedDict()

    def __len__(self) -> int:
        return len(self._judged)

    def find(self, token: str) -> Judged | None:
        """What was found out about a token before."""
        digest = _digest(token)
        judged = self._judged.get(digest)
        if judged is not None:
            self._judged.move_to_end(digest)
        return judged

    def put(self, token: str, judged: Judged) -> None:
        """Remembers a token that was found good just now."""
        self._judged[_digest(token)] = judged
        if len(self._judged) > self._tokens_max:
            self._judged.popitem(last=False)


def _digest(token: str) -> bytes:
    # No good token has a character that needs replacing.
    return hashlib.sha256(token.encode("ascii", "replace")).digest()
