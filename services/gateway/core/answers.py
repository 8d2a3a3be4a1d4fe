"""The answer to one request. Owns: its sequences, and which of them have ended.

Must not know: clocks. The moments of a request arrive as seconds on one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.core.answer import Answer
from services.gateway.core.attempts import Output, WorkOrder
from services.gateway.core.events import Chunk, Finished, Started, Usage
from services.gateway.core.jobs import Grant
from services.gateway.core.log import Entry
from services.gateway.core.params import GenerationJob


class Answers:
    """The sequences of a request, from its acceptance to the end of the last.

    Args:
        job: What is asked.
        accepted_s: When the request was accepted.
    """

    def __init__(self, job: GenerationJob, accepted_s: float) -> None:
        params = job.params
        self._job = job
        self._accepted_s = accepted_s
        self._all = tuple(
            Answer(
                # The prompt is read once, and counted in the first.
                0 if sequence else len(job.prompt_ids),
                params.max_tokens,
                job.words,
                params.stop,
                accepted_s=accepted_s,
                scored=params.logprobs is not None,
                sequence=sequence,
            )
            for sequence in range(params.n)
        )
        self._open = set(range(params.n))

    def __getitem__(self, sequence: int) -> Answer:
        return self._all[sequence]

    @property
    def complete(self) -> tuple[int, ...]:
        """The sequences that have not ended, and of which nothing is left to generate."""
        return tuple(sequence for sequence in sorted(self._open) if self._all[sequence].is_complete)

    @property
    def progress(self) -> int:
        """Tokens and ends so far: once there are any, only the same revision may go on."""
        return sum(answer.index for answer in self._all) + len(self._all) - len(self._open)

    @property
    def usage(self) -> Usage:
        """Tokens of all sequences, and the prompt once."""
        return sum((answer.usage for answer in self._all), Usage())

    @property
    def used_tokens(self) -> int:
        """Tokens of prompt and answer: what is charged."""
        return sum(answer.used_tokens for answer in self._all)

    @property
    def queue_s(self) -> float:
        """How long the request waited for its first grant; 0 while it waits."""
        return self._all[0].queue_s

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in a cache, as far as is known."""
        return self._all[0].cached_prompt_tokens

    def is_last(self, sequence: int) -> bool:
        """Whether all other sequences have ended."""
        return len(self._open) == 1 and sequence in self._open

    def grant(self, now_s: float) -> None:
        """Notes a grant; the first one ends the time in the queue."""
        for answer in self._all:
            answer.grant(now_s)

    def continues(self, output: Output) -> bool:
        """Whether `output` begins where a sequence ends, and is what was asked for."""
        return output.sequence in self._open and self._all[output.sequence].continues(output)

    def end(self, sequence: int, now_s: float) -> Finished:
        """Ends a sequence whose text was flushed, or stopped; returns its last event."""
        is_last = self.is_last(sequence)
        self._open.discard(sequence)
        return self._all[sequence].finished(now_s, is_last=is_last)

    def finish(self, now_s: float) -> Finished:
        """Ends the one sequence that is left."""
        (sequence,) = self._open
        return self.end(sequence, now_s)

    def work_order(self, grant: Grant, number: int, credit_tokens: int) -> WorkOrder:
        """What the granted worker is told: start number `number` of the job, behind all that there is."""
        job = self._job
        return WorkOrder(
            job_id=job.job_id,
            attempt=number,
            request_id=job.request_id,
            model=job.model,
            revision=grant.revision,
            epoch=grant.epoch,
            prompt_ids=job.prompt_ids,
            emitted=tuple(answer.token_ids for answer in self._all),
            ended=frozenset(range(len(self._all))) - self._open,
            max_tokens=job.params.max_tokens,
            sampling=job.params.sampling,
            credit_tokens=credit_tokens,
            logprobs=job.params.logprobs,
            form=job.params.form,
        )

    def restore(self, entries: Sequence[Entry]) -> bool:
        """Goes through a log that another gateway wrote; returns whether its text is what comes out here."""
        said, logged = ([""] * len(self._all) for _ in range(2))
        for entry in entries:
            at_s, event = self._accepted_s + entry.at_s, entry.event
            if isinstance(event, Started):
                self.grant(at_s)
            elif isinstance(event, Chunk):
                answer = self._all[event.sequence]
                if event.index != answer.index:
                    return False
                answer.note_cached(entry.cached_prompt_tokens)
                output = Output(event.index, event.token_ids, logprobs=event.logprobs)
                said[event.sequence] += answer.push(output, at_s).text
                logged[event.sequence] += event.text
            elif isinstance(event, Finished) and not event.is_last:
                self._all[event.sequence].note_cached(event.usage.cached_prompt_tokens)
                said[event.sequence] += self._all[event.sequence].flush(event.reason).text
                self._open.discard(event.sequence)
        return said == logged
