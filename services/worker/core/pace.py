"""The pace of prefill. Owns: how many prompt tokens a step takes in, by what earlier steps took. Pure.

Streams wait for the prefill that shares a step with them. How long it takes depends on the machine, the
model and the tokens before, and a short chunk costs far more than its share of a long one. So nothing is
assumed: a chunk that took too long makes the next one shorter, and one that was quick makes it longer.
"""

from __future__ import annotations

# A step with prefill should take this many times as long as one without. Steps vary, so it is below the
# three times that streams may come to feel at their slowest twentieth.
STALL_RATIO = 2.4

# A step of prefill alone takes about this long at most: commands wait for it, and gateways take two silent
# seconds for a hang.
PREFILL_STEP_S_MAX = 0.5

# Chunks never get shorter than this; below it, reading the weights costs more than the tokens.
CHUNK_TOKENS_MIN = 16

# How fast chunks get longer again, for each step that was quicker than it had to be.
GROWTH_MAX = 1.25

# The weight of the newest decode: one step that the machine interrupted changes little.
_NEWEST = 0.25


class PrefillPace:
    """Measures steps and tells the next chunk's length.

    Args:
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
    """

    def __init__(self, chunk_tokens: int, shared_chunk_tokens: int) -> None:
        self._alone = _Length(chunk_tokens)
        self._shared = _Length(shared_chunk_tokens)
        self._decode_s = 0.0

    def budget(self, *, shared: bool) -> int:
        """Most prompt tokens of the next step; `shared` when it also decodes."""
        return int((self._shared if shared else self._alone).tokens)

    def note(self, step_s: float, *, chunk_tokens: int, decodes: int) -> None:
        """Takes in how long a step took that did so much."""
        if not chunk_tokens:
            known = self._decode_s or step_s
            self._decode_s = known + _NEWEST * (step_s - known)
        elif not decodes:
            self._alone.adapt(chunk_tokens, step_s, PREFILL_STEP_S_MAX)
        elif self._decode_s:
            allowed_s = (STALL_RATIO - 1) * self._decode_s
            self._shared.adapt(chunk_tokens, step_s - self._decode_s, allowed_s)


class _Length:
    """A length of chunks that follows what chunks take."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(CHUNK_TOKENS_MIN, most)
        self.tokens = float(most)

    def adapt(self, chunk_tokens: int, took_s: float, allowed_s: float) -> None:
        """Moves towards the length that takes as long as it may."""
        better = chunk_tokens * min(allowed_s / max(took_s, 1e-6), GROWTH_MAX)
        # A prompt's end is shorter than it might be, and says nothing about longer chunks.
        if better < self.tokens and (took_s > allowed_s or chunk_tokens >= int(self.tokens)):
            self.tokens = max(self._least, better)
        elif better > self.tokens:
            self.tokens = min(self._most, better)
