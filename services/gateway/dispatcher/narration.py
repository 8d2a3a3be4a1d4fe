"""What the client of one request is told. Owns: its answer, and how that becomes events in the outbox.

Must not know: the queue, the workers or the life of the request.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.common.clock import Clock
from services.gateway.core.answer import Answer
from services.gateway.core.attempts import Output
from services.gateway.core.detokenizer import Piece
from services.gateway.core.events import Finished, FinishReason, Queued, Started
from services.gateway.core.jobs import Grant, Waiting
from services.gateway.core.log import Entry
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import Meter
from services.gateway.dispatcher.outbox import Outbox


class Narration:
    """Tells of places, grants, text and the end.

    Attributes:
        answer: The answer so far.
        started: The latest grant, as the client is told of it; None before the first.

    Args:
        job: What is asked.
        outbox: Where the events go.
        clock: Measures.
        meter: Hears of the first token.
    """

    def __init__(self, job: GenerationJob, outbox: Outbox, clock: Clock, meter: Meter) -> None:
        self._job = job
        self._outbox = outbox
        self._clock = clock
        self._meter = meter
        self._accepted_s = clock.monotonic() - job.waited_s
        self.answer = Answer(
            len(job.prompt_ids),
            job.params.max_tokens,
            job.decode,
            job.params.stop,
            accepted_s=self._accepted_s,
            scored=job.params.logprobs is not None,
        )
        self.started: Started | None = None
        self._unsaid = False
        self._position: int | None = None

    def restore(self, entries: Sequence[Entry], started: Started | None) -> bool:
        """Goes on behind a log; returns whether its text is what comes out here."""
        self.started = started
        return self.answer.restore(entries)

    def place(self, place: Waiting) -> None:
        """Tells a new place in the queue."""
        if place.position != self._position:
            self._position = place.position
            self._outbox.put(Queued(place.position, place.estimated_wait_s))

    def granted(self) -> None:
        """The request has a slot: the first one ends its time in the queue."""
        self._position = None
        self.answer.grant(self._clock.monotonic())

    def start(self, grant: Grant, attempt: int) -> None:
        """Tells that a worker is asked."""
        # Later workers are named with their first tokens: the client need not hear of those that refuse.
        self._unsaid = self.started is not None
        self.started = Started(
            request_id=self._job.request_id,
            model=self._job.model,
            revision=grant.revision,
            worker_id=grant.worker_id,
            attempt=attempt,
            queue_s=self.answer.queue_s,
            degraded=grant.degraded,
        )
        if not self._unsaid:
            self._outbox.put(self.started)

    def take(self, output: Output) -> Piece:
        """Takes tokens in; what they add to the text is told with `tell`."""
        now_s = self._clock.monotonic()
        if self.answer.index == 0:
            self._meter.first_token(self._job.model, now_s - self._accepted_s)
        return self.answer.push(output, now_s)

    def tell(self, piece: Piece, index: int) -> None:
        """Tells text and tokens from `index` on, and before them of their worker."""
        self._say_started()
        self._outbox.put_piece(piece, index)

    def flush(self, reason: FinishReason) -> None:
        """Tells what was held back: the worker has ended the text."""
        self._say_started()
        piece = self.answer.flush(reason)
        self._outbox.put_piece(piece, self.answer.index)

    def finish(self) -> Finished:
        """Tells the end."""
        finished = self.answer.finished(self._clock.monotonic())
        self._outbox.put(finished)
        return finished

    def _say_started(self) -> None:
        if self._unsaid and self.started is not None:
            self._unsaid = False
            self._outbox.put(self.started)
