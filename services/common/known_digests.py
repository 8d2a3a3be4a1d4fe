"""Digests that were computed before. Owns: whether a file is still the one whose digest is known.

A revision's files are read whole for their digests when they come, and again when they are loaded. Between
the two requests wait, by swap; so what has not been touched since is believed. Everything here blocks.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

# Some revisions of the largest public checkpoints, which have a few hundred files.
FILES_KNOWN_MAX = 4_096
# As hashlib reads a file.
_READ_BYTES = 1 << 18


class _Identity(NamedTuple):
    """What changes when anybody writes to a file; the kernel alone sets the time of change."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


class KnownDigests:
    """The digests of files that one process has read. Threads may share it."""

    def __init__(self) -> None:
        self._digests: dict[_Identity, str] = {}
        self._guard = threading.Lock()

    def matches(
        self,
        path: Path,
        size_bytes: int,
        sha256: str,
        on_read: Callable[[int], None] = lambda _more_bytes: None,
    ) -> bool:
        """Whether `path` is a regular file of this size and content; it is read where that is not known.

        Args:
            path: The file.
            size_bytes: How long it must be.
            sha256: What its digest must be, in lower-case hexadecimal.
            on_read: Is told of each piece how many bytes were read; what it raises passes through.
        """
        try:
            with path.open("rb") as stream:
                facts = os.fstat(stream.fileno())
                if not stat.S_ISREG(facts.st_mode) or facts.st_size != size_bytes:
                    return False
                before = _identity(facts)
                digest = self._digests.get(before)
                if digest is None:
                    digest = read_digest(stream, on_read)[1]
                    if _identity(os.fstat(stream.fileno())) == before:
                        self._keep(before, digest)
                return digest == sha256
        except OSError:
            return False

    def note(self, path: Path, sha256: str) -> None:
        """Takes in the digest of a file that was checked while it was written, and is closed."""
        self._keep(_identity(path.stat()), sha256)

    def _keep(self, identity: _Identity, digest: str) -> None:
        with self._guard:
            self._digests[identity] = digest
            while len(self._digests) > FILES_KNOWN_MAX:
                del self._digests[next(iter(self._digests))]


def read_digest(stream: IO[bytes], on_read: Callable[[int], None]) -> tuple[int, str]:
    """How many bytes there are, and their digest; tells of each piece how many were read."""
    hashed, size_bytes = hashlib.sha256(), 0
    while piece := stream.read(_READ_BYTES):
        hashed.update(piece)
        size_bytes += len(piece)
        on_read(len(piece))
    return size_bytes, hashed.hexdigest()


def _identity(facts: os.stat_result) -> _Identity:
    return _Identity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
