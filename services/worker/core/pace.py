"""The pace of prefill. Owns: how many prompt tokens a step takes in, by what earlier steps took. Pure.

Streams wait for the prefill that shares a step with them. How long a token of it takes depends on the
machine and the model, so it is measured, as is a step without it.
"""

from __future__ import annotations

# A step with prefill should take at most this many times as long as one without. The steps vary, so it is
# well below the three times that streams may come to feel at their slowest twentieth.
STALL_RATIO = 2.0

# A step of prefill alone takes at most about this long: commands wait for it, and gateways take two silent
# seconds for a hang.
PREFILL_STEP_S_MAX = 0.5

# Chunks never get shorter than this; below it, reading the weights costs more than the tokens.
CHUNK_TOKENS_MIN = 16

# The weight of the newest measurement: one step that the machine interrupted changes little.
_NEWEST = 0.25


class PrefillPace:
    """Measures steps and tells the next chunk's length.

    Args:
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
    """

    def __init__(self, chunk_tokens: int, shared_chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._shared_chunk_tokens = shared_chunk_tokens
        self._decode_s = 0.0
        self._token_s = 0.0

    def budget(self, *, shared: bool) -> int:
        """Most prompt tokens of the next step; `shared` when it also decodes."""
        most = self._shared_chunk_tokens if shared else self._chunk_tokens
        if self._token_s == 0.0 or (shared and self._decode_s == 0.0):
            return most
        allowed_s = (STALL_RATIO - 1) * self._decode_s if shared else PREFILL_STEP_S_MAX
        return max(min(CHUNK_TOKENS_MIN, most), min(most, int(allowed_s / self._token_s)))

    def note(self, step_s: float, *, chunk_tokens: int, decodes: int) -> None:
        """Takes in how long a step took that did so much."""
        if not chunk_tokens:
            self._decode_s = _mean(self._decode_s, step_s)
            return
        prefill_s = step_s - (self._decode_s if decodes else 0.0)
        self._token_s = _mean(self._token_s, max(prefill_s, 0.0) / chunk_tokens)


def _mean(earlier: float, newest: float) -> float:
    return newest if earlier == 0.0 else earlier + _NEWEST * (newest - earlier)
