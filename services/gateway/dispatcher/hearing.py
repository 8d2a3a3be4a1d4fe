"""Hearing. Owns: the tie between one attempt and the request that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.gateway.core.attempts import Loss, Output, RefusalReason


class AttemptListener(Protocol):
    """Who listens to attempts by their numbers."""

    def output(self, number: int, output: Output) -> None:
        """Tokens of attempt `number`."""
        ...

    def refused(self, number: int, reason: RefusalReason, message: str) -> None:
        """Attempt `number` was not taken."""
        ...

    def lost(self, number: int, cause: str, loss: Loss) -> None:
        """The worker of attempt `number` is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Hearing:
    """The sink of one attempt: it names the attempt in all it says, so that late words are recognised."""

    listener: AttemptListener
    number: int

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        self.listener.output(self.number, output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        self.listener.refused(self.number, reason, message)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        self.listener.lost(self.number, cause, loss)
