"""What the client of one request is told. Owns: its answer, and how that becomes events in the outbox.

Must not know: the queue, the workers or the life of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from services.common.clock import Clock
from services.gateway.core.answers import Answers
from services.gateway.core.attempts import Output
from services.gateway.core.detokenizer import Piece
from services.gateway.core.events import Finished, FinishReason, Queued, Started
from services.gateway.core.jobs import Grant, Outcome, Waiting
from services.gateway.core.log import Entry
from services.gateway.core.params import GenerationJob
from services.gateway.core.ports import Meter
from services.gateway.dispatcher.outbox import Outbox

# Whoever is this near the front hears of every step.
FRONT_PLACES = 5

# Farther behind a place holds for this part of the wait that was told with it, and at most for the pause;
# where that is less than a second, until the next renewal. Telling each of hundreds every second takes time
# from the cores that workers compute on.
PLACE_HOLDS = 0.5
PLACE_PAUSE_S = 5.0


class Narration:
    """Tells of places, grants, text and the end.

    Attributes:
        answers: The answer so far, sequence by sequence.
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
        self.answers = Answers(job, self._accepted_s)
        self.started: Started | None = None
        # Attempts that used up no worker, but were cut short by another gateway's end.
        self._cut_short = 0
        self._unsaid = False
        self._position: int | None = None
        self._place_due_s = 0.0

    def restore(self, entries: Sequence[Entry], started: Started | None) -> bool:
        """Goes on behind a log; returns whether its text is what comes out here."""
        self.started = started
        self._cut_short = 0 if started is None else started.attempt - started.failures
        return self.answers.restore(entries)

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in a cache, as far as is known."""
        return self.answers.cached_prompt_tokens

    @property
    def place_due(self) -> bool:
        """Whether the client is to hear again where it stands, if it stands elsewhere."""
        return self._position is None or self._clock.monotonic() >= self._place_due_s

    def place(self, place: Waiting) -> None:
        """Tells a new place in the queue when one is due."""
        if not self.place_due:
            return
        # While no wait is known nothing has finished and places hardly change: each step is told.
        pause_s = min(PLACE_HOLDS * (place.estimated_wait_s or 0.0), PLACE_PAUSE_S)
        self._place_due_s = self._clock.monotonic() + (pause_s if place.position > FRONT_PLACES else 0.0)
        if place.position != self._position:
            self._position = place.position
            self._outbox.put(Queued(place.position, place.estimated_wait_s))

    def granted(self) -> None:
        """The request has a slot: the first one ends its time in the queue."""
        self._position = None
        self.answers.grant(self._clock.monotonic())

    def start(self, grant: Grant, failures: int) -> None:
        """Tells that a worker is asked, after so many that were used up."""
        # Later workers are named with their first tokens: the client need not hear of those that refuse.
        self._unsaid = self.started is not None
        self.started = Started(
            request_id=self._job.request_id,
            model=self._job.model,
            revision=grant.revision,
            worker_id=grant.worker_id,
            attempt=self._cut_short + failures + 1,
            queue_s=self.answers.queue_s,
            degraded=grant.degraded,
            failures=failures,
        )
        if not self._unsaid:
            self._outbox.put(self.started)

    def take(self, output: Output) -> Piece:
        """Takes tokens in; what they add to the text is told with `tell`."""
        now_s = self._clock.monotonic()
        answer = self.answers[output.sequence]
        if answer.index == 0 and self.answers.progress == 0:
            self._meter.first_token(self._job.model, now_s - self._accepted_s)
        return answer.push(output, now_s)

    def tell(self, piece: Piece, sequence: int, index: int) -> None:
        """Tells text and tokens of a sequence from `index` on, and before them of their worker."""
        self._say_started()
        self._outbox.put_piece(piece, index, sequence)

    def flush(self, sequence: int, reason: FinishReason) -> None:
        """Tells what was held back: the worker has ended the text of a sequence."""
        self._say_started()
        answer = self.answers[sequence]
        self._outbox.put_piece(answer.flush(reason), answer.index, sequence)

    def end(self, sequence: int) -> None:
        """Tells the end of a sequence that is not the last."""
        self._outbox.put(self.answers.end(sequence, self._clock.monotonic()))

    def finish(self) -> Finished:
        """Tells the end of the last sequence; returns it with what the whole request has used."""
        finished = self.answers.finish(self._clock.monotonic())
        self._outbox.put(finished)
        return replace(finished, usage=self.answers.usage)

    def charged_tokens(self) -> int:
        """What is charged of a request that waits again or leaves; the prompt once anything was generated."""
        return self.answers.used_tokens if self.answers.progress else 0

    def final_tokens(self, outcome: Outcome) -> int:
        """What is charged of a request that ends in a slot.

        Of one that failed there, as of one that leaves: its workers refused it or were lost. Any other one
        had its prompt read, or begun.
        """
        return self.charged_tokens() if outcome is Outcome.FAILED else self.answers.used_tokens

    def pin(self) -> str:
        """The revision whose text the client has, and which alone may go on; empty while there is none."""
        return self.started.revision if self.started is not None and self.answers.progress else ""

    def _say_started(self) -> None:
        if self._unsaid and self.started is not None:
            self._unsaid = False
            self._outbox.put(self.started)
