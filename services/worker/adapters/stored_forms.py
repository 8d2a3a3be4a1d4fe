"""Stored forms. Owns: the directory in which a host keeps revisions as workers hold them, and who makes one.

A form is a directory of safetensors files in the final layout. It appears whole, by one rename, or not at
all; the first worker that wants it makes it while the others wait, and then all map the same files. What
is in the files is their maker's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from services.common.errors import ArtifactInvalid
from services.common.partial_file import directory_descriptor
from services.common.safetensors_files import check_header, read_header

# Names what a form must look like: it changes whenever the files' content changes its meaning.
LAYOUT = 2

# How often a worker looks whether another one has made what it waits for; it also notices an abort then.
LOCK_POLL_S = 0.1

_INDEX = "form.json"
_BUILDING = ".building-"

Make = Callable[[Path], None]
"""Writes the files of a form into an empty directory."""


class StoredForms:
    """The forms of one host.

    Args:
        directory: Where they lie; several processes may share it.
        bytes_max: Beyond it the least recently used are removed. A form that is mapped stays readable to who
            has mapped it.
    """

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self._bytes_max = bytes_max

    def obtain(self, key: str, make: Make, wait: Callable[[], None]) -> Path:
        """The directory of a form, which is made when it is missing or damaged.

        Args:
            key: Names everything that the form depends on; a plain file name.
            make: Makes it.
            wait: Called again and again while another process makes one; what it raises ends the wait.

        Raises:
            OSError: The disk is full, or not to be written to.
        """
        path = self._directory / key
        if not _is_whole(path):
            self._directory.mkdir(parents=True, exist_ok=True)
            with _exclusive(self._directory, wait):
                if not _is_whole(path):
                    self._make(path, make)
                    self._shrink(path)
        _touch(path)
        return path

    def discard(self, key: str) -> None:
        """Removes a form that turned out to be wrong; it is made again when it is wanted.

        Where it cannot be removed it stays: a disk that gives nothing back may take nothing either.
        """
        with contextlib.suppress(OSError):
            (self._directory / key / _INDEX).unlink()

    def _make(self, path: Path, make: Make) -> None:
        """Makes the form beside its place. The lock is held, so what was begun there is of no one alive."""
        for begun in self._directory.glob(f"{_BUILDING}*"):
            _remove(begun)
        building = self._directory / f"{_BUILDING}{os.getpid()}"
        building.mkdir()
        try:
            make(building)
            files = {file.name: _fingerprint(file) for file in building.iterdir()}
            (building / _INDEX).write_text(json.dumps({"layout": LAYOUT, "files": files}))
            for name in (*files, _INDEX):
                _sync(building / name)
            _remove(path)
            building.rename(path)
            _sync(self._directory)
        finally:
            _remove(building)

    def _shrink(self, kept: Path) -> None:
        """Removes the least recently used beyond the bound, but never what was just asked for."""
        forms = [entry for entry in self._directory.iterdir() if entry.is_dir() and entry != kept]
        total = _bytes_of(kept)
        for form in sorted(forms, key=_used_at_s, reverse=True):
            total += _bytes_of(form)
            if total > self._bytes_max:
                _remove(form)


def key_of(*facts: object) -> str:
    """A key of everything that a form depends on."""
    text = json.dumps([LAYOUT, *map(str, facts)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Whether every file is there with the size and the header that it was made with."""
    try:
        index = json.loads((path / _INDEX).read_bytes())
        files = dict(index["files"])
        whole = index["layout"] == LAYOUT and all(
            _fingerprint(path / name) == list(known) for name, known in files.items()
        )
        for name in files:
            if name.endswith(".safetensors"):
                check_header(path / name)
    except (OSError, ValueError, KeyError, TypeError, ArtifactInvalid):
        return False
    return whole and bool(files)


def _fingerprint(path: Path) -> list[object]:
    """Size and digest: of the header of weights, which says what is where, and of all of the rest."""
    content = read_header(path) if path.suffix == ".safetensors" else path.read_bytes()
    return [path.stat().st_size, hashlib.sha256(content).hexdigest()]


@contextlib.contextmanager
def _exclusive(directory: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds the directory's advisory lock, which ends with the process and leaves no file behind."""
    with directory_descriptor(directory) as descriptor:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
                time.sleep(LOCK_POLL_S)
        yield


def _touch(form: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(form / _INDEX)


def _used_at_s(form: Path) -> float:
    try:
        return (form / _INDEX).stat().st_mtime
    except OSError:
        return 0.0


def _bytes_of(form: Path) -> int:
    try:
        return sum(file.stat().st_size for file in form.iterdir())
    except OSError:
        return 0


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
