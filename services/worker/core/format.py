"""Formats. Owns: the shapes that an output can be held to, their bounds, and what holding to one means.

Must not know: how a shape is compiled, or the tensors that its masks are applied to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

# The bounds of the contract. They also bound what one compilation can cost.
SCHEMA_BYTES_MAX = 64 * 1024
REGEX_BYTES_MAX = 4 * 1024
GRAMMAR_BYTES_MAX = 64 * 1024
CHOICES_MAX = 256
CHOICE_BYTES_MAX = 1024


class FormatKind(StrEnum):
    """The kinds of shapes; the names are those of the fields of `interlock.v1.OutputFormat`."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Format:
    """A shape.

    Attributes:
        kind: How `texts` are read.
        texts: The schema, expression or grammar as one text; or the choices.
    """

    kind: FormatKind
    texts: tuple[str, ...]


_BYTES_MAX = {
    FormatKind.JSON_SCHEMA: SCHEMA_BYTES_MAX,
    FormatKind.REGEX: REGEX_BYTES_MAX,
    FormatKind.CHOICE: CHOICE_BYTES_MAX,
    FormatKind.GRAMMAR: GRAMMAR_BYTES_MAX,
}


class FormatBusy(Exception):
    """Too many formats wait to be compiled; another worker may have time."""


class ConstraintBroken(Exception):
    """The tokens do not fit the shape, or following it costs more than one step may.

    Its text is for the client, and names the format.
    """


class Constraint(Protocol):
    """One sequence that is held to a shape."""

    def allowed(self, emitted_ids: Sequence[int]) -> bytes:
        """Which tokens may follow `emitted_ids`, which begin with those of the last call.

        Returns:
            One bit a token id, least significant first; ids beyond the last byte are not allowed. An end
            token is allowed where the shape is complete.

        Raises:
            ConstraintBroken: None can.
        """
        ...


def format_flaw(form: Format) -> str | None:
    """What makes a format impossible, in words; None when it is within its bounds."""
    name = f"format.{form.kind}"
    most = CHOICES_MAX if form.kind is FormatKind.CHOICE else 1
    if not 1 <= len(form.texts) <= most:
        return f"{name}: 1 to {most} are allowed."
    limit = _BYTES_MAX[form.kind]
    if not all(1 <= len(text.encode()) <= limit for text in form.texts):
        return f"{name}: 1 to {limit} bytes are allowed."
    return None
