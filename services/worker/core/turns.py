"""The turns of a session. Owns: when tokens that are held back are told. Pure.

All sequences of a session have the same turns: what is told together costs its gateway, and this worker, less
than as much at several times. They fall on the ends of steps where they can.
"""

from __future__ import annotations

# More would look like a worker that hangs.
HOLD_S_MAX = 1.0

# A step that ends this near the end of a hold is told with it; the next one would be late.
_NEARLY = 7 / 8


class Turns:
    """Holds the tokens of a session's sequences.

    Attributes:
        hold_s: How long tokens are held back at most, in seconds; 0: they are not.
    """

    def __init__(self) -> None:
        self.hold_s = 0.0
        self._last_s = float("-inf")

    def hold_ms(self, milliseconds: int) -> None:
        """Holds tokens for so long from now on, within bounds."""
        self.hold_s = min(milliseconds / 1_000, HOLD_S_MAX)

    def is_due(self, now_s: float) -> bool:
        """Whether the end of a step now is a turn: so long was none."""
        return now_s - self._last_s >= self.hold_s * _NEARLY

    def take(self, now_s: float) -> None:
        """It is a turn."""
        self._last_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds to the next turn, if no step ends before."""
        return max(0.0, self._last_s + self.hold_s - now_s)
