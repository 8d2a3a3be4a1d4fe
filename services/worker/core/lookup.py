"""Prompt lookup. Owns: guesses of what a sequence says next, from what it said before. Pure.

Text repeats itself: names, code, quotations of the prompt. Where the last two tokens stood before, what
followed them then is a good guess. A model checks several tokens in one pass, which costs little more than
one when nobody else decodes; guesses change how fast tokens come, never which.
"""

from __future__ import annotations

from collections.abc import Sequence

# After a guess of which nothing was right, so many tokens are made without one, at most.
REST_TOKENS_MAX = 16


class PromptLookup:
    """Guesses for one sequence. Remembers where each pair of its tokens stood last."""

    def __init__(self) -> None:
        self._followed_at: dict[tuple[int, int], int] = {}
        self._seen = 1
        self._rest = 0
        self._next_rest = 1

    def guess(self, history: Sequence[int], most: int) -> tuple[int, ...]:
        """What may follow `history`, at most `most` tokens; it must have grown since the last call."""
        # The last pair is looked up before it is remembered: it stands at the end itself.
        for at in range(self._seen, len(history) - 1):
            self._followed_at[history[at - 1], history[at]] = at + 1
        self._seen = max(self._seen, len(history) - 1)
        if self._rest > 0:
            self._rest -= 1
            return ()
        if most < 1 or len(history) < 2:
            return ()
        found = self._followed_at.get((history[-2], history[-1]))
        return () if found is None else tuple(history[found : found + most])

    def learn(self, right: int) -> None:
        """Takes in how many tokens of the last guess were right: useless ones become rare."""
        if right:
            self._next_rest = 1
            return
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, REST_TOKENS_MAX)
