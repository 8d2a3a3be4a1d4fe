"""The outbox of a session. Owns: what waits to be written to one gateway, and that it stays bounded.

While the writer is behind, or outputs are held back, those of one sequence join into one; so the outbox holds
at most what credit allows, however slow the reader is.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.worker.core.admission import Refusal
from services.worker.core.sequence import Output, SequenceKey

# One message stays far below the 4 MiB that peers read: a token id takes at most five bytes.
STEP_TOKENS_MAX = 65_536

# What a token's own score, and each of its alternatives, weighs beside a token id on the wire.
SCORE_TOKENS = 2
ALTERNATIVE_TOKENS = 3

# A gateway that starts this many refused jobs while it reads nothing is broken; its session ends.
REFUSALS_MAX = 4_096


class OutboxFull(Exception):
    """The reader is too far behind for the session to go on."""


@dataclass(frozen=True, slots=True)
class Letter:
    """What is written next: outputs for one Step message, and refusals of one message each."""

    outputs: tuple[Output, ...]
    refusals: tuple[Refusal, ...]


class Outbox:
    """Joins what a session has to say until its writer comes for it."""

    def __init__(self) -> None:
        self._outputs: dict[SequenceKey, Output] = {}
        self._held: dict[SequenceKey, Output] = {}
        self._refusals: list[Refusal] = []

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write now."""
        return not self._outputs and not self._refusals

    @property
    def holds(self) -> bool:
        """Whether something is held back."""
        return bool(self._held)

    def put_output(self, output: Output) -> None:
        """Adds what a sequence produced, behind what is held back of it."""
        earlier = self._held.pop(output.key, None) or self._outputs.get(output.key)
        self._outputs[output.key] = output if earlier is None else earlier.followed_by(output)

    def hold(self, output: Output, tokens_max: int) -> None:
        """Adds what a sequence produced, to be written later.

        Unless something of it is about to be written, which takes it along, or so many of its tokens are held
        back together.
        """
        if output.key in self._outputs:
            self.put_output(output)
            return
        earlier = self._held.pop(output.key, None)
        whole = output if earlier is None else earlier.followed_by(output)
        line = self._held if len(whole.token_ids) < tokens_max else self._outputs
        line[output.key] = whole

    def release(self) -> None:
        """Lets everything be written that is held back."""
        # A sequence is in one of both at a time.
        self._outputs.update(self._held)
        self._held.clear()

    def put_refusal(self, refusal: Refusal) -> None:
        """Adds a refusal.

        Raises:
            OutboxFull: There are too many unread ones.
        """
        if len(self._refusals) >= REFUSALS_MAX:
            raise OutboxFull
        self._refusals.append(refusal)

    def take(self) -> Letter:
        """Removes and returns as much as one message carries, oldest first."""
        taken: list[Output] = []
        room = STEP_TOKENS_MAX
        for output in tuple(self._outputs.values()):
            fitting = room // _token_weight(output)
            if fitting < len(output.token_ids):
                if fitting:
                    # What is left begins behind it, and keeps its place at the head of the line.
                    head, self._outputs[output.key] = output.split(fitting)
                    taken.append(head)
                # One that is not begun stays as it is: its first part tells what was cached.
                break
            taken.append(output)
            del self._outputs[output.key]
            room -= len(output.token_ids) * _token_weight(output)
        refusals, self._refusals = tuple(self._refusals), []
        return Letter(tuple(taken), refusals)


def _token_weight(output: Output) -> int:
    """What each of its tokens weighs on the wire, in token ids."""
    if not output.scores:
        return 1
    return 1 + SCORE_TOKENS + ALTERNATIVE_TOKENS * max(len(score.alternatives) for score in output.scores)
