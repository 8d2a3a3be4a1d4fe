"""Rollouts as files. Owns: how a record outlives its controller in a directory, one JSON file a rollout.

    MODEL/NUMBER/ID.json         NUMBER: the fencing number of the controller that wrote it
    MODEL/NUMBER/claimed         empty; it keeps a directory without records from being replaced

A controller that takes the records over copies them into a directory of its own number, and the one with the
highest number is read. So a predecessor that slept and wakes writes where nobody looks any more, whatever it
was about to do, and no lock can outlive the one who held it. A record is written beside its final name,
synced, and renamed: a reader sees the old one or the new one, and a crash loses neither.

Knows nothing of what a rollout does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from services.common import logs
from services.common.errors import StoreUnavailable
from services.common.partial_file import sync_directory
from services.common.threads import in_thread
from services.controller.core.ports import FenceStale
from services.controller.core.records import Claimed
from services.controller.core.rollout_history import worth_keeping
from services.controller.core.rollout_record import Rollout

# A record is some hundred bytes and a line for each state; more is no record.
RECORD_BYTES_MAX = 1 << 20
_MARK = "claimed"
_FRESH = ".claim-"
# A claim takes milliseconds; one that is this old was cut.
_CUT_S = 3_600.0

_RECORD = TypeAdapter(Rollout)
T = TypeVar("T")


class FileRolloutRecords:
    """`RolloutRecords` in a directory.

    Args:
        directory: Is made with the first claim.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._claims: dict[str, int] = {}

    async def claim(self, model: str, fence: int) -> Claimed:
        """See `RolloutRecords.claim`. A file that is no record is named in the log, passed over and kept."""
        return await _told(lambda: self._claim(model, fence))

    async def newest(self, model: str) -> int:
        """The number of the newest claim; 0: there was none."""
        return await _told(lambda: self._newest(model))

    async def save(self, rollout: Rollout) -> None:
        """See `RolloutRecords.save`."""
        await _told(lambda: self._save(rollout))

    def close(self) -> None:
        """See `RolloutRecords.close`: nothing runs between calls."""

    def _claim(self, model: str, fence: int) -> Claimed:
        place = self._directory / model
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        known = _numbers(place)
        number = max(fence, known[-1] + 1 if known else 0)
        # Under a name that is no number: half a copy is never taken for the records.
        fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=place))
        try:
            (fresh / _MARK).touch()
            rollouts = _take_over(place / str(known[-1]), fresh) if known else ()
            sync_directory(fresh)
            _give_name(fresh, place, number, known)
        except FileNotFoundError:
            raise FenceStale("Another controller took the records over meanwhile.") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        sync_directory(place)
        self._claims[model] = number
        for old in known:
            _remove(place / str(old))
        return Claimed(number, rollouts)

    def _newest(self, model: str) -> int:
        place = self._directory / model
        return max(_numbers(place), default=0) if place.is_dir() else 0

    def _save(self, rollout: Rollout) -> None:
        place = self._directory / rollout.spec.model
        number = self._claims[rollout.spec.model]
        directory = place / str(number)
        final, fresh = directory / f"{rollout.id}.json", directory / f"{rollout.id}.new"
        try:
            is_new = not final.exists()
            _write(fresh, rollout)
            fresh.replace(final)
            try:
                sync_directory(directory)
            except OSError:
                # What the caller is told of as not made must not be found later.
                if is_new:
                    final.unlink(missing_ok=True)
                raise
        except FileNotFoundError:
            raise FenceStale(f"The records of {number} are gone: another controller took over.") from None
        if (highest := _numbers(place)[-1]) > number:
            raise FenceStale(f"A controller with the fence {highest} has taken the records over.")


async def _told(work: Callable[[], T]) -> T:
    """Runs `work` in a thread, to its end; what the disk refuses becomes our error."""
    try:
        return await in_thread(work)
    except OSError as error:
        raise StoreUnavailable(f"The rollouts cannot be recorded: {error.strerror}.") from error


def _numbers(place: Path) -> list[int]:
    """The fencing numbers that claims were made with, in their order."""
    return sorted(int(entry.name) for entry in place.iterdir() if entry.name.isdecimal())


def _sweep(place: Path) -> None:
    """Removes what claims left that were cut long ago."""
    for entry in place.glob(f"{_FRESH}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime > _CUT_S:
                shutil.rmtree(entry, ignore_errors=True)


def encode(rollout: Rollout) -> bytes:
    """A record as it is kept."""
    return json.dumps(asdict(rollout)).encode()


def decode(text: bytes, name: str) -> Rollout | None:
    """A record that was kept under `name`; None, and the log says so: it is none."""
    try:
        record = _RECORD.validate_json(text)
    except ValidationError:
        logs.get_logger().error("rollout.unreadable", file=name)
        return None
    return record if record.history else None


def in_order(found: Iterable[Rollout]) -> list[Rollout]:
    """Oldest first."""
    return sorted(found, key=lambda record: (record.history[0].time_ms, record.id))


def _take_over(old: Path, fresh: Path) -> tuple[Rollout, ...]:
    """Takes the records of `old` into `fresh`, those that cannot be read as well: a later version may.

    Returns:
        Those that can be read, oldest first; what nobody asks for any more is left behind.
    """
    for file in old.iterdir():
        if file.suffix == ".json":
            _link(file, fresh / file.name)
    found = in_order(record for file in fresh.glob("*.json") if (record := _read(file)) is not None)
    kept = worth_keeping(found)
    for record in found:
        if record.id not in kept:
            (fresh / f"{record.id}.json").unlink(missing_ok=True)
    return tuple(record for record in found if record.id in kept)


def _link(old: Path, new: Path) -> None:
    try:
        # A record is replaced, never changed, so both names may mean the same file.
        os.link(old, new)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(old, new)


def _write(file: Path, rollout: Rollout) -> None:
    with file.open("wb") as stream:
        stream.write(encode(rollout))
        stream.flush()
        os.fsync(stream.fileno())


def _give_name(fresh: Path, place: Path, number: int, known: Sequence[int]) -> None:
    """Makes a copy the records, unless somebody else claimed since it was made."""
    final = place / str(number)
    stale = FenceStale("Another controller took the records over meanwhile.")
    if _numbers(place) != list(known):
        raise stale
    try:
        fresh.rename(final)
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
            raise stale from None
        raise
    if not set(_numbers(place)) <= {*known, number}:
        # In the moment before; what is there by now is not in the copy.
        _remove(final)
        raise stale


def _remove(claimed: Path) -> None:
    """Takes a directory its number first: nobody shall take half of it for the records."""
    # Another claim may be quicker, and what cannot be removed now is swept by a later one.
    with contextlib.suppress(OSError):
        gone = Path(tempfile.mkdtemp(prefix=_FRESH, dir=claimed.parent))
        try:
            claimed.rename(gone)
        finally:
            shutil.rmtree(gone, ignore_errors=True)


def _read(file: Path) -> Rollout | None:
    with file.open("rb") as stream:
        # A longer one is cut, and so no JSON.
        return decode(stream.read(RECORD_BYTES_MAX), file.name)
