"""A conversation's turns, as chat templates take them, and what becomes of them. Data alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

TokenIds = tuple[int, ...]

Aside = Callable[[Callable[[], TokenIds]], Awaitable[TokenIds]]
"""Calls what takes long where it holds nobody up, and returns what it returned."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What was said.
    """

    role: str
    content: str
