"""A log at hand. Owns: what stands in the log of a request that runs here, for the clients that follow it.

Must not know: the store. An entry comes in only when the store has it, so that nobody here reads what another
gateway may yet say differently; while the store is away, as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.common.errors import InterlockError
from services.gateway.core.events import Queued, Started
from services.gateway.core.log import Entry


class Journal:
    """The log of one request, as far as it was written.

    Attributes:
        digest: Digest of what was asked.
        entries: The log.
        queued: The latest place in the queue; it is news and not part of the log.
        started: The latest grant.
        moved: Whether another gateway writes the log now: its readers must turn to the store.
        error: What the request ended with, where the log could not be told.
        readers: Are called after every change.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.entries: list[Entry] = []
        self.queued: Queued | None = None
        self.started: Started | None = None
        self.moved = False
        self.error: InterlockError | None = None
        self.readers: set[Callable[[], None]] = set()

    @property
    def ended(self) -> bool:
        """Whether nothing will be added here."""
        return self.moved or self.error is not None or bool(self.entries and self.entries[-1].is_last)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Adds what is told now: what the store has, unless it is away."""
        for entry in entries:
            self.entries.append(entry)
            if isinstance(entry.event, Started):
                self.started = entry.event
        self._tell()

    def place(self, queued: Queued) -> None:
        """Notes a new place in the queue."""
        self.queued = queued
        self._tell()

    def move(self) -> None:
        """Sends the readers to the store."""
        if not self.ended:
            self.moved = True
        self._tell()

    def fail(self, error: InterlockError) -> None:
        """Ends with an error that no log tells."""
        if not self.ended:
            self.error = error
        self._tell()

    def _tell(self) -> None:
        for reader in tuple(self.readers):
            reader()
