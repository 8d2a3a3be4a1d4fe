"""Log files of bounded size. Owns: what of a process's output is kept on disk, and how its tail is read."""

from __future__ import annotations

import contextlib
from pathlib import Path

# A day of a busy laptop; with the previous file twice as much stays per process.
LOG_BYTES_MAX = 8 * 1024 * 1024
# A screen of an error and what led to it.
_TAIL_BYTES = 64 * 1024
# JSON lines with a traceback fill pages; their beginning says what happened.
_TAIL_COLUMNS = 240


class LogFile:
    """Appends to `path`, and moves it to `<path>.1` when it is full.

    Args:
        path: The file; its directory exists.
        bytes_max: Size at which a new file is begun.
    """

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def write(self, data: bytes) -> None:
        """Appends `data` at once; what the disk does not take is lost.

        Whoever writes here watches over a process, and a full disk must not end that watch.
        """
        with contextlib.suppress(OSError):
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._size and self._size + len(data) > self._bytes_max:
            # Not there: it was moved before, and nothing new could be opened then.
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(self.path.with_name(self.path.name + ".1"))
            fresh = self.path.open("ab", buffering=0)
            self._file.close()
            self._file, self._size = fresh, 0
        self._file.write(data)
        self._size += len(data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def size_bytes(path: Path) -> int:
    """How much a log holds; 0 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def tail(path: Path, lines: int = 15, *, from_byte: int = 0, columns: int | None = _TAIL_COLUMNS) -> str:
    """The last lines of a log; empty when there is none.

    Args:
        path: The log.
        lines: How many at most.
        from_byte: What stands before it is of an earlier run.
        columns: Where a line is cut; None: nowhere.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            # A log that is shorter than it was has been begun anew.
            file.seek(max(from_byte if from_byte <= size else 0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(_cut(line, columns) for line in text.splitlines()[-lines:])


def _cut(line: str, columns: int | None) -> str:
    return line if columns is None or len(line) <= columns else line[:columns] + " [...]"
