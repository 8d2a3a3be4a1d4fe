"""Turns of a conversation that are being read. Owns: how those that belong together become one.

Must not know: any API; which turns belong together is the caller's to say.
"""

from __future__ import annotations

from services.common.conversation import Message


class Turns:
    """Turns in their order. One of many parts is put together once: a body has room for thousands of them."""

    def __init__(self) -> None:
        self._roles: list[str] = []
        self._parts: list[list[str]] = []

    def add(self, turn: Message, *, follows: bool) -> None:
        """Adds a turn.

        Args:
            turn: The turn.
            follows: Whether it is part of the turn before, where that is of the same side.
        """
        if follows and self._roles and self._roles[-1] == turn.role:
            self._parts[-1].append(turn.content)
            return
        self._roles.append(turn.role)
        self._parts.append([turn.content])

    def all(self) -> list[Message]:
        """The turns; the parts of each are lines of one text."""
        return [Message(role, "\n".join(parts)) for role, parts in zip(self._roles, self._parts, strict=True)]
