"""Tallies. Owns: how the attempts at each revision ended, and how soon their first tokens came, as counts.

They only grow while the process lives: whoever compares two looks at them knows what happened in between.
Must not know: who is judged by them, or how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.common.ttft_buckets import BUCKETS, bucket_of

# A mesh serves a handful of revisions at a time; the one that was used longest ago makes room.
REVISIONS_MAX = 16


@dataclass(slots=True)
class RevisionTally:
    """What became of the attempts at one revision.

    Attributes:
        model: The model.
        revision: The revision.
        finished: Attempts whose text came to its end.
        failed: Attempts that failed by the worker's doing. Refusals and cancellations are none.
        ttft: Attempts by the bucket of the time from their order to their first token.
    """

    model: str
    revision: str
    finished: int = 0
    failed: int = 0
    ttft: list[int] = field(default_factory=lambda: [0] * BUCKETS)


class Tallies:
    """One tally a revision, since the process started."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], RevisionTally] = {}

    def __iter__(self) -> Iterator[RevisionTally]:
        """Every tally, the one that was changed last at the end."""
        return iter(self._tallies.values())

    def count_finished(self, model: str, revision: str) -> None:
        """An attempt came to its end."""
        self._tally(model, revision).finished += 1

    def count_failed(self, model: str, revision: str) -> None:
        """An attempt failed by the worker's doing."""
        self._tally(model, revision).failed += 1

    def count_first_token(self, model: str, revision: str, ttft_s: float) -> None:
        """An attempt's first token came so long after its order."""
        self._tally(model, revision).ttft[bucket_of(ttft_s)] += 1

    def _tally(self, model: str, revision: str) -> RevisionTally:
        key = (model, revision)
        tally = self._tallies.pop(key, None) or RevisionTally(model, revision)
        self._tallies[key] = tally
        while len(self._tallies) > REVISIONS_MAX:
            del self._tallies[next(iter(self._tallies))]
        return tally
