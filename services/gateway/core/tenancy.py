"""Tenants. Owns: what one may take, as its token asks and configuration bounds, and what it took. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# What a message can tell of any limit; no machine has as many requests or tokens a minute.
LIMIT_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may use.

    Attributes:
        tokens_per_minute: Tokens of prompt and output within a minute, of each model; None: any number.
        concurrency: Requests that run at once, of each model; waiting ones do not count. None: any number.
        weight: Its share in the queue, relative to other tenants; 1 to 100.
    """

    tokens_per_minute: int | None = None
    concurrency: int | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class TenantBounds:
    """What tenants get at most, and where their token does not say. None: any number.

    Larger numbers count as `LIMIT_MAX`.

    Attributes:
        most: No token gets more than this.
        default: For tokens that do not say; never more than `most`.
    """

    most: TenantLimits = TenantLimits(weight=100)
    default: TenantLimits = TenantLimits()

    def grant(
        self, *, tokens_per_minute: int | None, concurrency: int | None, weight: int | None
    ) -> TenantLimits:
        """What a tenant gets that asks for this; None: its token does not say."""
        return TenantLimits(
            _least(tokens_per_minute or self.default.tokens_per_minute, self.most.tokens_per_minute),
            _least(concurrency or self.default.concurrency, self.most.concurrency),
            min(weight or self.default.weight, self.most.weight),
        )


def part_of(bound: int | None, gateways: int) -> int | None:
    """One of several gateways' part of a bound, at least 1; none of what is not bounded."""
    return None if bound is None else max(1, bound // gateways)


def _least(asked: int | None, most: int | None) -> int | None:
    """The smaller one of two bounds of which either may be missing; what may be told where there is one."""
    return min((min(bound, LIMIT_MAX) for bound in (asked, most) if bound is not None), default=None)


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
