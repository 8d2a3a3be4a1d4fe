"""The mailbox. Owns: how commands cross from the event loop to the step thread, bounded."""

from __future__ import annotations

import threading
from collections import deque

from services.worker.core.stepper import Command

# Seconds' worth of commands for a thousand streams; a mailbox this full means that the thread hangs.
COMMANDS_MAX = 65_536


class Mailbox:
    """Commands on their way to the step thread: bounded, and closed once."""

    def __init__(self) -> None:
        self._commands: deque[Command] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, command: Command, *, urgent: bool = False) -> bool:
        """Adds a command; returns False when there is no room. `urgent` ones always find it."""
        with self._changed:
            if len(self._commands) >= COMMANDS_MAX and not urgent:
                return False
            self._commands.append(command)
            self._changed.notify()
            return True

    def take(self, *, wait: bool) -> list[Command] | None:
        """Removes all commands, after waiting for the first where asked to; None once closed."""
        with self._changed:
            while wait and not self._commands and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def close(self) -> None:
        """Lets the thread end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
