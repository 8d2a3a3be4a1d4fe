"""The outbox of one request. Owns: events on their way to the client, and how far a worker may be ahead.

Must not know: the queue, the workers or the wire. Tokens that nobody took yet are merged, so that one write
carries all that is there. The outbox is bounded by credit: a worker sends no more than it was allowed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from services.gateway.core.detokenizer import Piece
from services.gateway.core.events import Chunk, Event, Finished, Queued, Started


@dataclass(slots=True)
class _Window:
    """How far the worker is ahead with one sequence.

    Attributes:
        ahead_tokens: Tokens that the client has not.
        taken_tokens: Those of them that the reader has taken.
        owed_tokens: Credit that is to be renewed.
    """

    ahead_tokens: int = 0
    taken_tokens: int = 0
    owed_tokens: int = 0


class Outbox:
    """Events in their order, for one reader.

    Args:
        credit_tokens: Most tokens of each sequence that may be on their way to the client.
        sequences: How many sequences there are.
    """

    def __init__(self, credit_tokens: int, sequences: int = 1) -> None:
        self._credit_tokens = credit_tokens
        # Renewing in quarters costs one message in so many tokens and never lets a reader's worker pause.
        self._renewal_tokens = max(1, credit_tokens // 4)
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._windows = tuple(_Window() for _ in range(sequences))

    def __len__(self) -> int:
        return len(self._events)

    @property
    def has_output(self) -> bool:
        """Whether there is text, or an end, that nobody took yet."""
        return any(isinstance(event, Chunk | Finished) for event in self._events)

    def first_credit_tokens(self) -> int:
        """What a new attempt may send of a sequence at once: the window, less what was not read yet."""
        first = max(1, self._credit_tokens - max(window.ahead_tokens for window in self._windows))
        for window in self._windows:
            # Credit that was owed to the attempt before this one is part of the new one's window.
            window.owed_tokens = max(0, self._credit_tokens - window.ahead_tokens - first)
        return first

    def put(self, event: Event) -> None:
        """Adds an event; a place or a grant that was not taken yet gives way to a newer one."""
        is_news = isinstance(event, Queued | Started)
        if is_news and self._events and type(self._events[-1]) is type(event):
            self._events.pop()
        self._events.append(event)
        self._changed.set()

    def put_piece(self, piece: Piece, index: int, sequence: int = 0) -> None:
        """Adds text and tokens of a sequence from `index` on, merged with those that nobody took yet."""
        if not piece.text and not piece.token_ids:
            return
        self._windows[sequence].ahead_tokens += len(piece.token_ids)
        place = self._mergeable(sequence)
        if place is None:
            self._events.append(Chunk(index, piece.text, piece.token_ids, piece.logprobs, sequence))
        else:
            last = self._events[place]
            assert isinstance(last, Chunk)
            token_ids, logprobs = last.token_ids + piece.token_ids, last.logprobs + piece.logprobs
            self._events[place] = Chunk(last.index, last.text + piece.text, token_ids, logprobs, sequence)
        self._changed.set()

    def take(self) -> Event:
        """Removes and returns the oldest event."""
        event = self._events.popleft()
        if isinstance(event, Chunk):
            self._windows[event.sequence].taken_tokens += len(event.token_ids)
        return event

    def acknowledge(self) -> list[tuple[int, int]]:
        """Notes that what was taken is written; returns sequences and the credit to renew now, often none."""
        due: list[tuple[int, int]] = []
        for sequence, window in enumerate(self._windows):
            window.ahead_tokens -= window.taken_tokens
            window.owed_tokens += window.taken_tokens
            window.taken_tokens = 0
            if window.owed_tokens >= self._renewal_tokens:
                due.append((sequence, window.owed_tokens))
                window.owed_tokens = 0
        return due

    def wake(self) -> None:
        """Lets the reader look again."""
        self._changed.set()

    async def wait(self) -> None:
        """Returns at the next `put` or `wake`."""
        self._changed.clear()
        await self._changed.wait()

    def _mergeable(self, sequence: int) -> int | None:
        """Where a chunk of the sequence waits behind which nothing but chunks stands; None: nowhere."""
        for place in range(len(self._events) - 1, -1, -1):
            event = self._events[place]
            if not isinstance(event, Chunk):
                return None
            if event.sequence == sequence:
                return place
        return None
