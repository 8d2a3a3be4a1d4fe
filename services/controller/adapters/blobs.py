"""Contents by their digest. Owns: each content once, whole or on its way, and how much of them there is.

    SHA256                   a whole content; revisions' directories hold links to it
    .SHA256.OWNER.partial    one on its way, which the next attempt goes on with

The owner is this object: each time of leading has one of its own, and an earlier one may still write. It
holds what it has open, and the next one takes over what nobody holds (`settle`); what somebody does hold it
leaves alone, and those bytes come again. So a file is written by one owner, and named by that one only.

What was promised to somebody is never removed: to the upload that is under way, and for a while to whoever
was told what is here. Must not know: what contents belong together. Everything blocks where nothing else is
said; callers use a thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common import logs
from services.common.clock import Clock
from services.common.errors import ArtifactInvalid, QuotaExceeded
from services.common.known_digests import KnownDigests
from services.common.partial_file import PartialFile, make_directory, partial_path, take_over

# A content that nothing names may belong to an upload that goes on tomorrow; after a day it does not.
ORPHAN_KEPT_S = 86_400.0
# Whoever was told what is here begins to send at once, or after another upload of some minutes.
PROMISE_KEPT_S = 600.0
# One upload is under way, and few people plan another one within ten minutes; the oldest promise gives way.
PROMISES_MAX = 64


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of the directory."""

    path: Path
    size_bytes: int
    modified_s: float


class Blobs:
    """The contents in one directory.

    Args:
        directory: Where they are; made when the first one comes.
        clock: The time.
        bytes_max: Most bytes of all of them.
    """

    def __init__(self, directory: Path, clock: Clock, *, bytes_max: int) -> None:
        self._directory = directory
        self._clock = clock
        self._bytes_max = bytes_max
        self._owner = secrets.token_hex(4)
        self._known = KnownDigests()
        # At most one entry for each content that was here; threads add to it and look into it.
        self._damaged: set[str] = set()
        # Between the look whether anybody counts on a content and its removal nobody is told that it is here.
        self._guard = threading.Lock()
        # Until when, and what. Replaced and never changed: threads read it.
        self._promises: dict[str, tuple[float, frozenset[str]]] = {}

    def path(self, sha256: str) -> Path:
        """Where a content is when it is whole."""
        return self._directory / sha256

    def whole(self, sha256: str, size_bytes: int) -> Path | None:
        """Where a content is; None where it is not, or not all of it."""
        path = self.path(sha256)
        with contextlib.suppress(OSError):
            if path.stat().st_size == size_bytes:
                return path
        return None

    def was_damaged(self, sha256: str) -> bool:
        """Whether a content was found damaged here: revisions that have links to it have it no better."""
        return sha256 in self._damaged

    def promise(self, name: str, digests: Iterable[str], for_s: float) -> None:
        """Keeps these contents from removal for at least so long; `name` says for whom. Does not block.

        What `missing` finds here after this is there for as long.
        """
        now = self._clock.monotonic()
        until, _ = self._promises.get(name, (now, None))
        kept = {one: promise for one, promise in self._promises.items() if promise[0] > now and one != name}
        for oldest in sorted(kept, key=lambda one: kept[one][0])[: max(0, len(kept) + 1 - PROMISES_MAX)]:
            del kept[oldest]
        self._promises = {**kept, name: (max(until, now + for_s), frozenset(digests))}

    def release(self, name: str) -> None:
        """Ends a promise. Does not block."""
        self._promises = {one: promise for one, promise in self._promises.items() if one != name}

    def missing(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Those of `sizes` that are not whole, with the byte from which on each is missing."""
        with self._guard:
            return {
                sha256: self._received_bytes(sha256, size_bytes)
                for sha256, size_bytes in sizes.items()
                if self.whole(sha256, size_bytes) is None
            }

    def part(self, sha256: str, size_bytes: int) -> PartialFile:
        """A content on its way, to be opened. Does not block."""
        return PartialFile(self.path(sha256), size_bytes, sha256, owner=self._owner)

    def settle(self, sizes: Mapping[str, int]) -> None:
        """Gives their names to contents that were cut off after their last byte; throws away wrong ones.

        What others left of them is ours from now on. Nothing of ours may write one of `sizes` meanwhile.
        """
        self._take_over(sizes)
        for sha256, size_bytes in sizes.items():
            self._drop_damaged(sha256, size_bytes)
            if size_bytes and _size_of(self._partial(sha256)) == size_bytes:
                file = self.part(sha256, size_bytes)
                try:
                    file.open()
                    file.finish()
                except ArtifactInvalid:
                    file.discard()
                finally:
                    file.close()

    def _drop_damaged(self, sha256: str, size_bytes: int) -> None:
        """Sees that a content comes again that is not any more what came; who has links to it keeps them."""
        whole = self.whole(sha256, size_bytes)
        if whole is not None and not self._known.matches(whole, size_bytes, sha256):
            logs.get_logger().error("blob.damaged", sha256=sha256)
            self._damaged.add(sha256)
            whole.unlink(missing_ok=True)

    def discard(self, sha256: str) -> None:
        """Removes what has come of a content that is on its way."""
        self._partial(sha256).unlink(missing_ok=True)

    def collect(self, named: Collection[str]) -> None:
        """Removes what is neither named nor linked from anywhere, once it is old; whole or on its way."""
        old = self._clock.now() - ORPHAN_KEPT_S
        for entry in self._all():
            if entry.modified_s <= old:
                self._remove(entry.path, named)

    def drop(self, digests: Iterable[str]) -> None:
        """Removes whole contents, however young; what is linked or counted on stays."""
        for sha256 in digests:
            self._remove(self.path(sha256))

    def is_promised(self, sha256: str) -> bool:
        """Whether somebody counts on a content. Does not block."""
        now = self._clock.monotonic()
        return any(until > now and sha256 in digests for until, digests in self._promises.values())

    def make_room(
        self, sizes: Mapping[str, int], named: Collection[str], *, elsewhere: Mapping[str, int] | None = None
    ) -> None:
        """Sees that the contents of `sizes` can be taken in; what nobody counts on gives way, oldest first.

        Args:
            sizes: The contents.
            named: The digests that are never removed.
            elsewhere: Contents that count as kept here although they may not be: they can be asked for.

        Raises:
            QuotaExceeded: There is no room for them, and what could go would not be enough.
        """
        make_directory(self._directory)
        # What is on its way of `sizes` will be what `sizes` says.
        others = [entry for entry in self._all() if _digest_of(entry.path) not in sizes]
        here = sizes.keys() | {entry.path.name for entry in others}
        absent = sum(size_bytes for one, size_bytes in (elsewhere or {}).items() if one not in here)
        excess = absent + sum(entry.size_bytes for entry in others) + sum(sizes.values()) - self._bytes_max
        if excess <= 0:
            return
        free = [entry for entry in others if self._is_free(entry.path, named)]
        if sum(entry.size_bytes for entry in free) < excess:
            raise QuotaExceeded("The controller keeps as many bytes as it may; delete a revision first.")
        for entry in sorted(free, key=lambda entry: entry.modified_s):
            if excess > 0 and self._remove(entry.path, named):
                excess -= entry.size_bytes
        if excess > 0:
            raise QuotaExceeded("Another upload was planned meanwhile; try again when it has ended.")

    def _take_over(self, digests: Collection[str]) -> None:
        """Makes parts ours that others left and nobody writes; the longest where there are several."""
        for entry in sorted(self._all(), key=lambda entry: entry.size_bytes, reverse=True):
            sha256 = _digest_of(entry.path)
            if entry.path.suffix == ".partial" and sha256 in digests:
                ours = self._partial(sha256)
                if not ours.exists():
                    take_over(entry.path, ours)

    def _remove(self, path: Path, named: Collection[str] = ()) -> bool:
        """Removes one that nobody needs; whether it did."""
        with self._guard:
            if not self._is_free(path, named):
                return False
            with contextlib.suppress(OSError):
                path.unlink()
                return True
        return False

    def _is_free(self, path: Path, named: Collection[str]) -> bool:
        """Whether no revision has it and nobody counts on it. A part of what is whole elsewhere is free."""
        try:
            links = path.stat().st_nlink
        except OSError:
            return False
        return links == 1 and path.name not in named and not self.is_promised(_digest_of(path))

    def _received_bytes(self, sha256: str, size_bytes: int) -> int:
        """How much of a content is here that is still on its way; more than there can be counts as none."""
        size = _size_of(self._partial(sha256))
        return size if size <= size_bytes else 0

    def _all(self) -> list[_Entry]:
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    facts = entry.stat()
                    found.append(_Entry(Path(entry.path), facts.st_size, facts.st_mtime))
        return found

    def _partial(self, sha256: str) -> Path:
        return partial_path(self.path(sha256), self._owner)


def _digest_of(path: Path) -> str:
    """Which content a file is, or a part of."""
    return path.name.removeprefix(".").partition(".")[0]


def _size_of(path: Path) -> int:
    """0 for what is not there, or not any more."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
