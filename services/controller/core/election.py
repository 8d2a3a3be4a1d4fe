"""Who shall lead. Owns: when a controller that does not lead may ask for the lead, and with which claim.

A lease says by itself who leads. Two cases need a judgement that the store cannot make:

- No lease is known. A new mesh has none, and a store that was restarted empty has forgotten the one of a
  leader that is alive and founds it again within a second. So who has seen a lease before waits for as long
  as one holds.
- The lease is of our own id. At our start it is that of an earlier process, which is over. Later it is that
  of a later process, or of another one that bears our id by mistake, and both are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.controller.core.records import Standing


@dataclass(frozen=True, slots=True)
class Election:
    """What a controller has learned of the lease.

    Attributes:
        ttl_s: How long a lease holds.
        answered: Whether the store was ever reached.
        vacant_since_s: Since when no lease was known, after there had been one; None: there is one.
    """

    ttl_s: float
    answered: bool = False
    vacant_since_s: float | None = None

    def may_replace(self) -> bool:
        """Whether the lead may be taken from a controller of our own id."""
        return not self.answered

    def may_found(self, now_s: float) -> bool:
        """Whether a lease may be founded where none is known."""
        if not self.answered:
            return True
        return self.vacant_since_s is not None and now_s - self.vacant_since_s >= self.ttl_s

    def after(self, standing: Standing, now_s: float) -> Election:
        """What is known after an answer of the store."""
        vacant = not standing.leader_id
        since_s = (now_s if self.vacant_since_s is None else self.vacant_since_s) if vacant else None
        return replace(self, answered=True, vacant_since_s=since_s)
