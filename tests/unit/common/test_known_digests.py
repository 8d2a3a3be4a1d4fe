"""Digests are computed once for a file, and again when anybody has touched it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from services.common import known_digests
from services.common.known_digests import KnownDigests

CONTENT = b"weights" * 1_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each file that is read whole."""
    read: list[str] = []
    read_digest = known_digests.read_digest

    def counted(stream: IO[bytes], on_read: Callable[[int], None]) -> tuple[int, str]:
        read.append(stream.name)
        return read_digest(stream, on_read)

    monkeypatch.setattr(known_digests, "read_digest", counted)
    return read


def test_a_file_is_read_once_while_nobody_touches_it(tmp_path: Path, reads: list[str]) -> None:
    """Right or wrong, its digest is known from then on."""
    path, known = tmp_path / "f", KnownDigests()
    path.write_bytes(CONTENT)
    assert known.matches(path, len(CONTENT), DIGEST)
    assert known.matches(path, len(CONTENT), DIGEST)
    assert not known.matches(path, len(CONTENT), "0" * 64)
    assert len(reads) == 1


def test_a_flipped_byte_is_noticed_though_size_and_time_are_as_before(tmp_path: Path) -> None:
    """Whoever sets the time of modification back cannot set the time of change."""
    path, known = tmp_path / "f", KnownDigests()
    path.write_bytes(CONTENT)
    assert known.matches(path, len(CONTENT), DIGEST)
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as stream:
            stream.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not known.matches(path, len(CONTENT), DIGEST)


def test_what_was_checked_while_it_was_written_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    """Until it is written to."""
    path, known = tmp_path / "f", KnownDigests()
    path.write_bytes(CONTENT)
    known.note(path, DIGEST)
    assert known.matches(path, len(CONTENT), DIGEST)
    assert not reads
    path.unlink()
    assert not known.matches(path, len(CONTENT), DIGEST)


def test_no_more_is_kept_than_there_is_room_for(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned first is forgotten first, and read again."""
    monkeypatch.setattr(known_digests, "FILES_KNOWN_MAX", 2)
    known, paths = KnownDigests(), [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(CONTENT)
        assert known.matches(path, len(CONTENT), DIGEST)
    assert known.matches(paths[2], len(CONTENT), DIGEST)
    assert len(reads) == 3
    assert known.matches(paths[0], len(CONTENT), DIGEST)
    assert len(reads) == 4
