"""One sequence of an answer. Owns: its tokens and text so far, and the numbers that are told at its end.

Must not know: clocks, or the other sequences. The moments of a request arrive as seconds on one monotonic
clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.gateway.core.attempts import Output
from services.gateway.core.detokenizer import Piece, Transcript
from services.gateway.core.events import Finished, FinishReason, Timings, Usage
from services.gateway.core.params import Words


@dataclass(slots=True)
class _Moments:
    accepted_s: float
    granted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None


class Answer:
    """One sequence from acceptance to its end.

    Args:
        prompt_tokens: Length of the prompt, where it is counted in this sequence; else 0.
        max_tokens: Most tokens that it may get.
        words: The tokenizer's way back to text.
        stops: Strings before which the text ends.
        accepted_s: When the request was accepted.
        scored: Whether each token must come with its logprob.
        sequence: Which of the request's, from 0.
    """

    def __init__(
        self,
        prompt_tokens: int,
        max_tokens: int,
        words: Words,
        stops: Sequence[str],
        *,
        accepted_s: float,
        scored: bool = False,
        sequence: int = 0,
    ) -> None:
        self._sequence = sequence
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._scored = scored
        self._transcript = Transcript(words, stops)
        self._cached_prompt_tokens = 0
        self._moments = _Moments(accepted_s)
        self._stop_text = ""
        self._stopped = False
        self._reason = FinishReason.STOP

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return tuple(self._transcript.token_ids)

    @property
    def used_tokens(self) -> int:
        """Tokens of prompt and answer: what is charged."""
        return self._prompt_tokens + len(self._transcript.token_ids)

    @property
    def index(self) -> int:
        """Position of the next token."""
        return len(self._transcript.token_ids)

    @property
    def queue_s(self) -> float:
        """How long the request waited for its first grant; 0 while it waits."""
        moments = self._moments
        return 0.0 if moments.granted_s is None else moments.granted_s - moments.accepted_s

    def grant(self, now_s: float) -> None:
        """Notes a grant; the first one ends the time in the queue."""
        if self._moments.granted_s is None:
            self._moments.granted_s = now_s

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in a cache, as far as is known."""
        return self._cached_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to generate."""
        return self._stopped or self.index >= self._max_tokens

    def continues(self, output: Output) -> bool:
        """Whether `output` begins where the answer ends, and is what was asked for."""
        tokens = len(output.token_ids)
        fits = self.index + tokens <= self._max_tokens
        return output.index == self.index and fits and len(output.logprobs) == tokens * self._scored

    def note_cached(self, tokens: int) -> None:
        """Notes how much of the prompt a cache had, as the first word of an answer tells, be it its end."""
        if self.index == 0:
            self._cached_prompt_tokens = min(tokens, self._prompt_tokens)

    def push(self, output: Output, now_s: float) -> Piece:
        """Takes the tokens of `output`; returns what they added to the text."""
        self._moments.last_token_s = now_s
        if self._moments.first_token_s is None:
            self._moments.first_token_s = now_s
        piece = self._transcript.push(output.token_ids)
        self._stop_text = piece.stop or ""
        self._stopped = piece.stop is not None
        if not output.logprobs:
            return piece
        return replace(piece, logprobs=output.logprobs[: len(piece.token_ids)])

    def flush(self, reason: FinishReason) -> Piece:
        """Ends the text for the worker's `reason`; returns what was held back."""
        if self._stopped:
            # Nothing is held back behind a stop string.
            return Piece("", ())
        piece = self._transcript.flush()
        self._stop_text = piece.stop or ""
        self._reason = FinishReason.STOP if piece.stop else reason
        return piece

    @property
    def usage(self) -> Usage:
        """Tokens used so far."""
        return Usage(self._prompt_tokens, self._cached_prompt_tokens, len(self._transcript.token_ids))

    def finished(self, now_s: float, *, is_last: bool) -> Finished:
        """The last event of the sequence; `is_last`: of the request, too."""
        timings = self._timings(now_s)
        return Finished(self._reason, self._stop_text, self.usage, timings, self._sequence, is_last)

    def _timings(self, now_s: float) -> Timings:
        moments = self._moments
        granted_s = now_s if moments.granted_s is None else moments.granted_s
        first_s = now_s if moments.first_token_s is None else moments.first_token_s
        last_s = first_s if moments.last_token_s is None else moments.last_token_s
        return Timings(
            queue_s=granted_s - moments.accepted_s,
            prefill_s=first_s - granted_s,
            decode_s=last_s - first_s,
            total_s=now_s - moments.accepted_s,
        )
