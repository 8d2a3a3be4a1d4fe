"""Quota of tokens. Owns: what each tenant has reserved and used in the minute, and whether more fits.

Pure: times are seconds of any clock. Windows are whole minutes of it. A job's estimate is reserved from its
admission to its end, however many windows that takes; what it used is charged to the window in which it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.errors import QuotaExceeded

WINDOW_MS = 60_000
# When running requests hold all of the quota, room comes as they end; nobody knows when.
RETRY_MIN_S = 1.0


@dataclass(slots=True)
class Account:
    """One tenant's minute."""

    window: int = 0
    used_tokens: int = 0
    reserved_tokens: int = 0


@dataclass(slots=True)
class QuotaBook:
    """The accounts of all tenants of one model."""

    accounts: dict[str, Account] = field(default_factory=dict)

    def account(self, tenant: str, now: float) -> Account:
        """The tenant's account, in the window of now."""
        account = self.accounts.setdefault(tenant, Account())
        window = round(now * 1000) // WINDOW_MS
        if account.window != window:
            account.window, account.used_tokens = window, 0
        return account

    def reserve(self, tenant: str, tokens: int, limit: int | None, now: float) -> None:
        """Reserves a job's estimate.

        Raises:
            QuotaExceeded: It does not fit.
        """
        account = self.account(tenant, now)
        taken = account.used_tokens + account.reserved_tokens
        if limit is not None and taken + tokens > limit:
            raise quota_exceeded(tokens, taken, limit, window_left_s(now))
        account.reserved_tokens += tokens

    def settle(self, tenant: str, reserved_tokens: int, used_tokens: int, now: float) -> None:
        """Replaces a job's reservation by what it used."""
        account = self.account(tenant, now)
        account.reserved_tokens -= reserved_tokens
        account.used_tokens += used_tokens


def window_age_s(now: float) -> float:
    """Seconds since the window of `now` began."""
    return round(now * 1000) % WINDOW_MS / 1000


def window_left_s(now: float) -> float:
    """Seconds until the window of `now` ends."""
    return (WINDOW_MS - round(now * 1000) % WINDOW_MS) / 1000


def quota_exceeded(tokens: int, taken: int, limit: int, left_s: float) -> QuotaExceeded:
    """The refusal with its numbers; one that no window could hold is not worth another try."""
    if tokens > limit:
        error = QuotaExceeded(
            f"The request may take {tokens} tokens; the limit is {limit} a minute. Ask for fewer max_tokens."
        )
        error.retryable = False
        return error
    return QuotaExceeded(
        f"The request may take {tokens} tokens, and {taken} of {limit} a minute are used or reserved.",
        retry_after_s=max(RETRY_MIN_S, left_s),
    )
