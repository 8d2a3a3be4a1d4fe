"""Tenants. Owns: what one tenant may take of a model's time, and what it has taken. Data alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may take, as its token says within the bounds of the configuration.

    Attributes:
        tokens_per_minute: Most tokens of prompts and answers in a minute; None: no bound.
        concurrency: Most requests that run at once; None: no bound.
        weight: Its share beside other tenants, 1 to 100.
    """

    tokens_per_minute: int | None = None
    concurrency: int | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What a tenant takes of one model now.

    Attributes:
        window_age_s: Time since the minute began that the tokens belong to.
        used_tokens: Tokens of requests that ended in this minute.
        reserved_tokens: Estimates of requests that wait or run.
        running: Requests that run.
    """

    window_age_s: float
    used_tokens: int
    reserved_tokens: int
    running: int
