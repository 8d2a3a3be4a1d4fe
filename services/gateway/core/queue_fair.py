"""Fair shares of one band. Owns: how much each tenant was served by weight, and what a grant is charged.

Pure. Virtual token counting: the tenant that was served least goes first. The scripts of the queue in Redis
follow the same rules, in the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Standing:
    """Where a tenant stands.

    Attributes:
        counter: Tokens charged, divided by weight.
        entry: Names the time since it last came from idleness.
        slack: How much of what was charged before that may still be taken back: no more than it was above
            the floor then, since the floor has forgiven the rest already.
    """

    counter: float
    entry: int
    slack: float


@dataclass(frozen=True, slots=True)
class Charge:
    """What a grant was charged: an estimate, until it is corrected.

    Attributes:
        amount: Tokens divided by weight.
        weight: The tenant's weight at that time.
        entry: The tenant's entry at that time.
    """

    amount: float
    weight: int
    entry: int


@dataclass(slots=True)
class FairShares:
    """The counters of one band. A tenant that was idle enters at the floor: idleness earns no credit."""

    floor: float = 0.0
    standings: dict[str, Standing] = field(default_factory=dict)
    entries: int = 0

    def enter(self, tenant: str) -> None:
        """A tenant that had nothing waiting has something now."""
        counter = self.counter_at_entry(tenant)
        self.entries += 1
        self.standings[tenant] = Standing(counter, self.entries, counter - self.floor)

    def counter(self, tenant: str) -> float:
        """What ranks a tenant that has entered; the least goes first."""
        return self.standings[tenant].counter

    def counter_at_entry(self, tenant: str) -> float:
        """What would rank a tenant if it entered now: its own counter or the floor, whichever is higher."""
        known = self.standings.get(tenant)
        return self.floor if known is None else max(known.counter, self.floor)

    def raise_floor(self, least: float) -> None:
        """A grant is made while `least` is the lowest counter of those that wait."""
        self.floor = max(self.floor, least)

    def charge(self, tenant: str, tokens: int, weight: int) -> Charge:
        """Charges the estimate of a grant."""
        standing = self.standings[tenant]
        charge = Charge(tokens / weight, weight, standing.entry)
        standing.counter += charge.amount
        return charge

    def correct(self, tenant: str, charge: Charge, used_tokens: int) -> None:
        """Replaces an estimate by what was used."""
        standing = self.standings.get(tenant)
        if standing is None:
            return
        delta = used_tokens / charge.weight - charge.amount
        if charge.entry != standing.entry and delta < 0:
            given = min(standing.slack, -delta)
            standing.slack -= given
            delta = -given
        standing.counter += delta

    def clear(self) -> None:
        """Forgets everything: nothing of the band waits or runs."""
        self.floor = 0.0
        self.standings.clear()
