"""Room in this process. Owns: how many requests it may carry, wherever in it they are.

Must not know: what they do there; each place says how many it has.
"""

from __future__ import annotations

from collections.abc import Callable

from services.gateway.core.queue_errors import gateway_full


class Room:
    """The bound of all places together.

    Attributes:
        requests_max: How many requests there may be.

    Args:
        requests_max: See above.
        places: Say how many requests they have.
    """

    def __init__(self, requests_max: int, *places: Callable[[], int]) -> None:
        self.requests_max = requests_max
        self._places = list(places)

    def add_place(self, place: Callable[[], int]) -> None:
        """Counts what another place has, from now on."""
        self._places.append(place)

    def check(self) -> None:
        """Refuses one more where there are as many as there may be.

        Raises:
            QueueFull: There are.
        """
        if sum(place() for place in self._places) >= self.requests_max:
            raise gateway_full(self.requests_max)
