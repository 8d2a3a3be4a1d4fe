"""Failures of commands. Owns: the one exception that ends a command with exit code 1."""

from __future__ import annotations


class CommandFailed(Exception):
    """A command could not do its work; the message says why and what to do next.

    Attributes:
        reason: The name of the `ErrorReason` of a call that failed, without its prefix; empty: none did.
    """

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
