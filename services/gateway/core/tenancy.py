"""Tenants. Owns: what one tenant may take of a model's time. Data alone."""

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
