"""Failures of commands. Owns: the one exception that ends a command with exit code 1."""

from __future__ import annotations


class CommandFailed(Exception):
    """A command could not do its work; the message says why and what to do next."""
