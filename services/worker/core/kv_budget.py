"""The budget of the KV cache. Owns: how much room sequences need, and which of them fit together. Pure.

The cache is a rectangle: rows times positions, each row as long as the longest. Sequences are admitted by
what they need now and a little more, not by what they may come to need: most answers end early.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from services.worker.core.sequence import LiveSequence, SequenceStart

# Attention lengths are rounded up to it, so that few shapes occur and memory grows in steps.
BUCKET_TOKENS = 16

# A sequence starts when it and all others can grow by this much. So whoever had to make room runs for at
# least that many steps before it may have to again.
HEADROOM_TOKENS = 64

# After so many preemptions a sequence waits until everything beside it fits at its full length, and is
# preempted only while it is paused. It bounds the work that is done twice.
PREEMPTIONS_MAX = 3


def bucketed(tokens: int) -> int:
    """`tokens` rounded up to whole buckets."""
    return -(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS


@dataclass(frozen=True, slots=True)
class KvBudget:
    """The room that there is.

    Attributes:
        tokens: Area of the KV cache: rows times positions.
        prefix_tokens: The part of it that rows of ended sequences may take while nobody needs it.
    """

    tokens: int
    prefix_tokens: int = 0

    def holds(self, lengths: Collection[int]) -> bool:
        """Whether sequences of these lengths fit together."""
        return len(lengths) * bucketed(max(lengths, default=0)) <= self.tokens

    def admits(self, starts: Collection[SequenceStart], running: Iterable[LiveSequence]) -> bool:
        """Whether each sequence fits in at its end, and all of them beside others now with headroom."""
        lengths = [*map(_first, starts), *map(_soon, running)]
        return self.holds([max(start.reserved_tokens for start in starts)]) and self.holds(lengths)

    def takes_back(self, live: LiveSequence, running: Collection[LiveSequence]) -> bool:
        """Whether a sequence without a row may have one."""
        everyone = [live, *running]
        if live.preemptions >= PREEMPTIONS_MAX:
            return self.holds([one.start.reserved_tokens for one in everyone])
        return self.holds([_soon(one) for one in everyone])

    def carries(self, running: Collection[LiveSequence]) -> bool:
        """Whether everything that runs can do its next step."""
        return self.holds([len(live.history) for live in running])

    def capacity(self, running: Collection[LiveSequence]) -> int:
        """Positions of a row: for the longest at its end while all fit so, else for what they hold now."""
        reserved = [live.start.reserved_tokens for live in running]
        lengths = reserved if self.holds(reserved) else [len(live.history) for live in running]
        return bucketed(max(lengths, default=0))


def _first(start: SequenceStart) -> int:
    """The length of a sequence some steps after its start."""
    now = len(start.prompt_ids) + len(start.emitted_ids)
    return min(start.reserved_tokens, now + HEADROOM_TOKENS)


def _soon(live: LiveSequence) -> int:
    """The length of a sequence after some steps."""
    return min(live.start.reserved_tokens, len(live.history) + HEADROOM_TOKENS)
