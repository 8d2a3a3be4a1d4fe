"""What a tenant may still take. Owns: its numbers, and the headers in which callers are used to read them.

Pure. Where it is counted is the queue's matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowance:
    """What was left to a tenant of one model when a request of it was admitted or refused.

    Attributes:
        tokens_limit: Tokens of prompt and output a minute; None: any number.
        tokens_left: Those that are neither used nor reserved, the request's own estimate counted.
        tokens_reset_s: Time until the minute ends, with which what was used in it counts no more.
        requests_limit: Requests that run at once; None: any number.
        requests_left: How many more, what waits counted.
    """

    tokens_limit: int | None
    tokens_left: int | None
    tokens_reset_s: float
    requests_limit: int | None
    requests_left: int | None


def allowance_of(
    tokens_limit: int | None, taken_tokens: int, reset_s: float, requests_limit: int | None, requests: int
) -> Allowance:
    """The allowance of a tenant that takes so many tokens of its minute, and has so many requests."""
    return Allowance(
        tokens_limit,
        None if tokens_limit is None else max(0, tokens_limit - taken_tokens),
        reset_s,
        requests_limit,
        None if requests_limit is None else max(0, requests_limit - requests),
    )


def headers(allowance: Allowance | None) -> tuple[tuple[str, str], ...]:
    """The headers that clients of hosted models read; none for what has no limit."""
    if allowance is None:
        return ()
    found: list[tuple[str, str]] = []
    if allowance.tokens_limit is not None:
        found += [
            ("x-ratelimit-limit-tokens", str(allowance.tokens_limit)),
            ("x-ratelimit-remaining-tokens", str(allowance.tokens_left)),
            ("x-ratelimit-reset-tokens", f"{math.ceil(allowance.tokens_reset_s)}s"),
        ]
    if allowance.requests_limit is not None:
        found += [
            ("x-ratelimit-limit-requests", str(allowance.requests_limit)),
            ("x-ratelimit-remaining-requests", str(allowance.requests_left)),
        ]
    return tuple(found)
