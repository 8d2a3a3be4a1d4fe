"""The outbox of one request. Owns: events on their way to the client, and how far a worker may be ahead.

Must not know: the queue, the workers or the wire. Tokens that nobody took yet are merged, so that one write
carries all that is there. The outbox is bounded by credit: a worker sends no more than it was allowed.
"""

from __future__ import annotations

import asyncio
from collections import deque

from services.gateway.core.detokenizer import Piece
from services.gateway.core.events import Chunk, Event


class Outbox:
    """Events in their order, for one reader.

    Args:
        credit_tokens: Most tokens that may be on their way to the client.
    """

    def __init__(self, credit_tokens: int) -> None:
        self._credit_tokens = credit_tokens
        # Renewing in quarters costs one message in so many tokens and never lets a reader's worker pause.
        self._renewal_tokens = max(1, credit_tokens // 4)
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._ahead_tokens = 0
        self._taken_tokens = 0
        self._owed_tokens = 0

    def __len__(self) -> int:
        return len(self._events)

    def first_credit_tokens(self) -> int:
        """What a new attempt may send at once: the window, less what the client has not read yet."""
        # Credit that was owed to the attempt before this one is part of the new one's window.
        self._owed_tokens = 0
        return max(1, self._credit_tokens - self._ahead_tokens)

    def put(self, event: Event) -> None:
        """Adds an event; one that was not taken yet gives way to a newer one of its kind."""
        if self._events and type(self._events[-1]) is type(event):
            self._events.pop()
        self._events.append(event)
        self._changed.set()

    def put_piece(self, piece: Piece, index: int) -> None:
        """Adds text and tokens from `index` on, merged with those that nobody took yet."""
        if not piece.text and not piece.token_ids:
            return
        self._ahead_tokens += len(piece.token_ids)
        chunk = Chunk(index, piece.text, piece.token_ids, piece.logprobs)
        if self._events and isinstance(self._events[-1], Chunk):
            last = self._events.pop()
            assert isinstance(last, Chunk)
            token_ids, logprobs = last.token_ids + chunk.token_ids, last.logprobs + chunk.logprobs
            chunk = Chunk(last.index, last.text + chunk.text, token_ids, logprobs)
        self._events.append(chunk)
        self._changed.set()

    def take(self) -> Event:
        """Removes and returns the oldest event."""
        event = self._events.popleft()
        if isinstance(event, Chunk):
            self._taken_tokens += len(event.token_ids)
        return event

    def acknowledge(self) -> int:
        """Notes that what was taken is written; returns the tokens of credit to renew now, often 0."""
        self._ahead_tokens -= self._taken_tokens
        self._owed_tokens += self._taken_tokens
        self._taken_tokens = 0
        if self._owed_tokens < self._renewal_tokens:
            return 0
        owed, self._owed_tokens = self._owed_tokens, 0
        return owed

    def wake(self) -> None:
        """Lets the reader look again."""
        self._changed.set()

    async def wait(self) -> None:
        """Returns at the next `put` or `wake`."""
        self._changed.clear()
        await self._changed.wait()
