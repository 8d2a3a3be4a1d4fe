"""The machine's own clocks. Composition roots hand them on as a `Clock`."""

from __future__ import annotations

import time


class SystemClock:
    """Reads the clocks of the operating system."""

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def now(self) -> float:
        """See `Clock.now`."""
        return time.time()
