"""A file on its way. Owns: that a name appears only over complete, checked and durable content.

Must not know: where bytes come from, or what they are for. Everything here blocks; callers use a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from services.common.errors import ArtifactInvalid, UploadConflict

# One step of reading: large enough for full speed, small enough to stay in cache.
READ_BYTES = 1 << 20

# File systems bear names of 255 bytes; while a file is on its way, its name is nine longer.
NAME_BYTES_MAX = 255 - len("..partial")


class PartialFile:
    """A file under a temporary name beside its final one, which it bears once its digest is right.

    Args:
        path: The final path; its directory exists, and its name has at most `NAME_BYTES_MAX` bytes.
        size_bytes: How long the content must be.
        sha256: What its digest must be, in lower-case hexadecimal.
        owner: Stands in the temporary name where several write the same content, each into a file of its own,
            which it holds while it is open; empty: whoever writes sees to it that nobody else does.
    """

    def __init__(self, path: Path, size_bytes: int, sha256: str, *, owner: str = "") -> None:
        self._path = path
        self._temporary = partial_path(path, owner)
        self._is_held = bool(owner)
        self._wanted_bytes = size_bytes
        self._wanted_sha256 = sha256
        self._stream: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def open(self, on_read: Callable[[int], None] = lambda _more_bytes: None) -> int:
        """Begins, or goes on where an earlier attempt ended; returns the number of bytes that are there.

        Args:
            on_read: Is told of each piece of what is there how many bytes were read; what it raises passes
                through, and then there is nothing left but to close.

        Raises:
            UploadConflict: Somebody takes the file over at this moment.
        """
        # O_NOFOLLOW: a link that somebody placed here must not lead the writes elsewhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._stream = os.fdopen(os.open(self._temporary, flags, 0o600), "r+b")
        if self._is_held and not _hold(self._stream.fileno(), self._temporary):
            raise UploadConflict("Another controller takes over what came; plan the upload again and go on.")
        if os.fstat(self._stream.fileno()).st_size > self._wanted_bytes:
            self._stream.truncate(0)
        while block := self._stream.read(READ_BYTES):
            self._digest.update(block)
            self._size_bytes += len(block)
            on_read(len(block))
        return self._size_bytes

    def append(self, chunk: bytes) -> int:
        """Writes the next bytes; returns how many are there now.

        Raises:
            ArtifactInvalid: They are more than the file shall have.
        """
        assert self._stream is not None
        if self._size_bytes + len(chunk) > self._wanted_bytes:
            raise ArtifactInvalid(f"{self._path.name}: more bytes came than the manifest says.")
        self._stream.write(chunk)
        self._digest.update(chunk)
        self._size_bytes += len(chunk)
        return self._size_bytes

    def finish(self) -> None:
        """Checks size and digest, makes the content durable, and gives the file its name.

        Raises:
            ArtifactInvalid: It is not the content that was wanted.
        """
        assert self._stream is not None
        if self._size_bytes < self._wanted_bytes:
            raise ArtifactInvalid(f"{self._path.name}: fewer bytes came than the manifest says.")
        if self._digest.hexdigest() != self._wanted_sha256:
            raise ArtifactInvalid(f"{self._path.name}: the content does not have the manifest's digest.")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._temporary.replace(self._path)
        sync_directory(self._path.parent)

    def discard(self) -> None:
        """Removes the temporary file."""
        self._temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Releases the descriptor; what was written so far stays for the next attempt."""
        if self._stream is not None:
            # A full disk was told already, or is told by the next attempt.
            with contextlib.suppress(OSError):
                self._stream.close()


def partial_path(path: Path, owner: str) -> Path:
    """Where the content of `path` is while its owner writes it."""
    return path.with_name(f".{path.name}.{owner}.partial" if owner else f".{path.name}.partial")


def take_over(left: Path, path: Path) -> bool:
    """Renames a partial file unless its owner has it open; returns whether it did.

    The owner may stand still for a minute and then write on: into a file that became ours those bytes must
    not come. Where it has it open, the file stays.
    """
    try:
        descriptor = os.open(left, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not _hold(descriptor, left):
            return False
        left.rename(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _hold(descriptor: int, path: Path) -> bool:
    """Holds an open file until it is closed; whether nobody else held it, and it still bears this name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False


@contextlib.contextmanager
def directory_descriptor(directory: Path) -> Iterator[int]:
    """An open descriptor of `directory`, for fsync and locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` durable: a file's own fsync does not."""
    with directory_descriptor(directory) as descriptor:
        os.fsync(descriptor)


def make_directory(directory: Path) -> None:
    """Makes a directory that is there after the power fails, and those above it where they are missing."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)
