"""Turns at something of which a few may go on at once. Owns: who has one, and who is next.

Pure; whoever waits is whatever the caller says. Of the tenants that wait the one with the fewest turns is
next, of equals the one that has waited longest since its last; what one tenant asks for goes in its order. No
tenant has all turns: whoever else comes goes on at once, or when the first of several tenants' turns ends.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Generic, TypeVar

W = TypeVar("W")


class Turns(Generic[W]):
    """A fair semaphore.

    Args:
        at_once: How many have a turn at most.
        of_tenant: How many of one tenant.
    """

    def __init__(self, at_once: int, of_tenant: int) -> None:
        self._free = at_once
        self._of_tenant = of_tenant
        # By tenant; those that have none are not in it.
        self._held: Counter[str] = Counter()
        # By tenant, the one that had its turn longest ago first; those that wait for nothing are not in it.
        self._lines: OrderedDict[str, OrderedDict[W, None]] = OrderedDict()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def waiting_of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return len(self._lines.get(tenant, ()))

    def take(self, tenant: str) -> bool:
        """Takes a turn if one is free and the tenant may have another."""
        # While one is free only those wait whose tenants have as many as they may.
        if not self._free or self._held[tenant] >= self._of_tenant:
            return False
        self._free -= 1
        self._held[tenant] += 1
        return True

    def wait(self, tenant: str, waiter: W) -> None:
        """Puts somebody behind the others of their tenant."""
        self._lines.setdefault(tenant, OrderedDict())[waiter] = None
        self._waiting += 1

    def leave(self, tenant: str, waiter: W) -> None:
        """Somebody does not wait any more. Without effect on who has had their turn."""
        line = self._lines.get(tenant)
        if line is None or waiter not in line:
            return
        del line[waiter]
        self._waiting -= 1
        if not line:
            del self._lines[tenant]

    def give_back(self, tenant: str) -> tuple[str, W] | None:
        """A tenant's turn is over; returns whose it is now, with their tenant. None: it is free."""
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        # The first of those with the fewest.
        following = min(self._lines, key=self._held.__getitem__, default=None)
        if following is None or self._held[following] >= self._of_tenant:
            self._free += 1
            return None
        line = self._lines.pop(following)
        waiter, _ = line.popitem(last=False)
        if line:
            self._lines[following] = line
        self._held[following] += 1
        self._waiting -= 1
        return following, waiter
