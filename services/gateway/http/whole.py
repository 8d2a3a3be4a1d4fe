"""An answer as a whole. Owns: what a reply is made of that does not stream. Data alone."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.core.events import Chunk, Finished, Started, Usage


@dataclass(frozen=True, slots=True)
class Said:
    """One sequence of an answer.

    Attributes:
        chunks: What was said, in its order.
        finished: How it ended.
    """

    chunks: tuple[Chunk, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """What was said."""
        return "".join(chunk.text for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole of an answer.

    Attributes:
        started: Who answered, at last.
        sequences: Its sequences, by their numbers; at least one.
    """

    started: Started
    sequences: tuple[Said, ...]

    @property
    def text(self) -> str:
        """What the first sequence said."""
        return self.sequences[0].text

    @property
    def finished(self) -> Finished:
        """How the first sequence ended."""
        return self.sequences[0].finished

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt, and of all sequences."""
        return sum((said.finished.usage for said in self.sequences), Usage())
