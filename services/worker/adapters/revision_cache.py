"""Downloaded revisions. Owns: in which directory of a host each lies, who uses it, and which ones go.

A directory is named by what is in it: revisions of the same files share one, and it never holds a file of
another revision. Who uses a directory holds a shared lock on a file in it, which ends with the process; what
no process uses goes, the least recently used first, where room is needed. All this is decided under one lock
of the host. Must not know where files come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from services.common import logs
from services.common.artifacts import FileDigest, exclusive, files_digest
from services.common.directory_size import bytes_below
from services.common.threads import in_thread

# Hidden, so that it is no file of the revision. Its time says when the directory was last used.
_USED = ".used"


class _Claim(NamedTuple):
    path: Path
    descriptor: int


class RevisionCache:
    """The directories that one process uses, of those of its host.

    Args:
        directory: Where they lie; several processes may share it.
        bytes_max: Beyond it the least recently used are removed, except for those that a process uses.
    """

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._claims: dict[str, _Claim] = {}

    async def claim(self, revision: str, files: Sequence[FileDigest]) -> Path:
        """The directory for the files of a revision, with room for them; it stays until `release`.

        What is in it already is of these files, whole or in part.

        Raises:
            OSError: The disk is full, or not to be written to.
        """
        path = self._directory / files_digest(files)
        known = self._claims.get(revision)
        if known is not None and known.path == path:
            return path
        self.release(revision)
        await in_thread(self._directory.mkdir, parents=True, exist_ok=True)
        async with exclusive(self._directory):
            # The thread keeps the claim itself: who is cancelled here gets no result, and releases it.
            await in_thread(self._claim, revision, path, sum(file.size_bytes for file in files))
        return path

    def release(self, revision: str) -> None:
        """The revision needs its files no more; one that claimed nothing is passed over."""
        claim = self._claims.pop(revision, None)
        if claim is None:
            return
        with contextlib.suppress(OSError):
            os.utime(claim.descriptor)
        # A child process may have the descriptor, too; unlocked, it is so for both.
        fcntl.flock(claim.descriptor, fcntl.LOCK_UN)
        os.close(claim.descriptor)

    def _claim(self, revision: str, path: Path, size_bytes: int) -> None:
        self._make_room(path, size_bytes)
        path.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path / _USED, flags, 0o600)
        self._claims[revision] = _Claim(path, descriptor)
        # Nobody locks it alone without the host's lock, which is held.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(descriptor)

    def _make_room(self, wanted: Path, size_bytes: int) -> None:
        """Removes what nobody uses, until `wanted` fits under the bound and onto the disk."""
        missing_bytes = max(0, size_bytes - bytes_below(wanted))
        others = [entry for entry in self._directory.iterdir() if entry.is_dir() and entry != wanted]
        sizes = {other: bytes_below(other) for other in others}
        total_bytes = size_bytes + sum(sizes.values())
        for other in sorted(others, key=_used_at_s):
            fits = shutil.disk_usage(self._directory).free >= missing_bytes
            if fits and total_bytes <= self._bytes_max:
                return
            if not _is_used(other):
                shutil.rmtree(other, ignore_errors=True)
                total_bytes -= sizes[other]
                logs.get_logger().info("files.removed", size_bytes=sizes[other])


def _is_used(directory: Path) -> bool:
    """Whether some process, this one included, has claimed it. The host's lock is held."""
    try:
        descriptor = os.open(directory / _USED, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _used_at_s(directory: Path) -> float:
    try:
        return (directory / _USED).stat().st_mtime
    except OSError:
        return 0.0
