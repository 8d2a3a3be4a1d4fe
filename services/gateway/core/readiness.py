"""Readiness. Owns: whether this gateway could answer a request now, and if not, why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Readiness:
    """The conditions of an answer, in the order in which a start fulfils them.

    Attributes:
        attached: Whether a controller has ever taken this gateway in.
        model_known: Whether a model's tokenizer is loaded and its revision active.
        store_reachable: Whether the queue answered when it was last asked.
        draining: Set when the gateway shuts down.
    """

    attached: Callable[[], bool]
    model_known: Callable[[], bool]
    store_reachable: Callable[[], bool]
    draining: bool = False

    def obstacle(self) -> str | None:
        """What is missing, for people; None: nothing."""
        if self.draining:
            return "The gateway is shutting down."
        if not self.attached():
            return "No controller has taken the gateway in yet."
        if not self.model_known():
            return "No model is active yet."
        if not self.store_reachable():
            return "The queue's store cannot be reached."
        return None
