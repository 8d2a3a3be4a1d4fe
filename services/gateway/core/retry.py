"""Retries. Owns: how many a gateway can afford, how long one waits, and whom a crash is blamed on.

Pure: the time is an argument.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

# A request that two workers have died of would kill a third one.
BLAMES_MAX = 2
# A supervisor restarts a worker within seconds; sooner, a client would only meet the same loss.
RETRY_AFTER_LOSS_S = 2.0
# Enough that streams of one dead worker do not fall on the next one in the same millisecond.
BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 1.0


@dataclass(slots=True)
class RetryBudget:
    """What a gateway spends on going on after a loss: so that a mesh that fails is not asked thrice as much.

    A worker's death costs one token, however many requests it carried; a success gives a part of one back.

    Attributes:
        tokens_max: Deaths in a row that are made good.
        ratio: What a success gives back.
        death_s: Losses of one worker within this time are one death.
        tokens: What is left.
    """

    tokens_max: float = 10.0
    ratio: float = 0.1
    death_s: float = 1.0
    tokens: float = 10.0
    # One entry a worker that was lost within `death_s`.
    _deaths: dict[str, float] = field(default_factory=dict)

    def spend(self, worker_id: str, now_s: float) -> bool:
        """Charges a loss; returns whether its request may go on elsewhere."""
        self._deaths = {one: at_s for one, at_s in self._deaths.items() if now_s - at_s < self.death_s}
        if worker_id in self._deaths:
            return True
        if self.tokens < 1:
            return False
        self._deaths[worker_id] = now_s
        self.tokens -= 1
        return True

    def earn(self) -> None:
        """Gives back for a success."""
        self.tokens = min(self.tokens_max, self.tokens + self.ratio)


def backoff_s(failures: int, nonce: str) -> float:
    """How long a request waits after loss number `failures`, from 1; the nonce of its grant spreads them."""
    share = zlib.crc32(nonce.encode()) / 2**32
    return float(min(BACKOFF_FIRST_S * 2 ** (failures - 1), BACKOFF_LAST_S) * share)
