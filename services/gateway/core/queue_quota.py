"""Quota of tokens. Owns: what each tenant has reserved and used in the minute, and whether more fits.

Pure: times are seconds of any clock. Windows are whole minutes of it. A job's estimate is reserved from its
admission to its end, however many windows that takes; what it used is charged to the window in which it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.errors import QuotaExceeded
from services.gateway.core.tenancy import part_of

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
    """The accounts of all tenants of one model.

    Attributes:
        accounts: By tenant.
        booked: The nonces of bookings, and until when each is remembered.
        gateways: How many share what tenants may take while each counts for itself: it lets its part through.
        began: When some minute began.
    """

    accounts: dict[str, Account] = field(default_factory=dict)
    booked: dict[str, float] = field(default_factory=dict)
    gateways: int = 1
    began: float = 0.0

    def account(self, tenant: str, now: float) -> Account:
        """The tenant's account, in the window of now."""
        account = self.accounts.setdefault(tenant, Account())
        window = self._ms(now) // WINDOW_MS
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
        part = part_of(limit, self.gateways)
        if limit is not None and part is not None and taken + tokens > part:
            raise quota_exceeded(tokens, taken, part, self.left_s(now), whole=limit)
        account.reserved_tokens += tokens

    def settle(self, tenant: str, reserved_tokens: int, used_tokens: int, now: float) -> None:
        """Replaces a job's reservation by what it used."""
        account = self.account(tenant, now)
        account.reserved_tokens -= reserved_tokens
        account.used_tokens += used_tokens

    def book(self, tenant: str, nonce: str, tokens: int, now: float, kept_until: float) -> None:
        """Charges what was used elsewhere: once, however often it is said until then."""
        self.booked = {known: until for known, until in self.booked.items() if until > now}
        if nonce not in self.booked:
            self.booked[nonce] = kept_until
            self.account(tenant, now).used_tokens += tokens

    def carry(self, tenant: str, taken_tokens: int, ends_at: float, now: float) -> None:
        """Goes on with a minute that ends later, of which all gateways took so much, with this one's part.

        What is reserved here is among what they took.
        """
        self.began = ends_at - WINDOW_MS / 1000
        account = self.account(tenant, now)
        account.used_tokens = max(0, -(-taken_tokens // self.gateways) - account.reserved_tokens)

    def age_s(self, now: float) -> float:
        """Seconds since the window of `now` began."""
        return self._ms(now) % WINDOW_MS / 1000

    def left_s(self, now: float) -> float:
        """Seconds until the window of `now` ends."""
        return (WINDOW_MS - self._ms(now) % WINDOW_MS) / 1000

    def _ms(self, now: float) -> int:
        return round((now - self.began) * 1000)


def quota_exceeded(
    tokens: int, taken: int, limit: int, left_s: float, *, whole: int | None = None
) -> QuotaExceeded:
    """The refusal with its numbers; one that no window could hold is not worth another try.

    `limit` may be one gateway's part of the `whole`, all of which counts again once the store is back.
    """
    whole = limit if whole is None else whole
    if tokens > whole:
        error = QuotaExceeded(
            f"The request may take {tokens} tokens; the limit is {whole} a minute. Ask for fewer max_tokens."
        )
        error.retryable = False
        return error
    return QuotaExceeded(
        f"The request may take {tokens} tokens, and {taken} of {limit} a minute are used or reserved.",
        retry_after_s=max(RETRY_MIN_S, left_s),
    )
