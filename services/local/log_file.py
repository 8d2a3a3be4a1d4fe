"""Log files of bounded size. Owns: what of a process's output is kept on disk, and how its tail is read."""

from __future__ import annotations

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
        """Appends `data` at once."""
        if self._size and self._size + len(data) > self._bytes_max:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(_cut(line) for line in text.splitlines()[-lines:])


def _cut(line: str) -> str:
    return line if len(line) <= _TAIL_COLUMNS else line[:_TAIL_COLUMNS] + " [...]"
