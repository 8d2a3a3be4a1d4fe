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

import asyncio
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from services.common import logs
from services.common.errors import StoreUnavailable
from services.controller.core.ports import FenceStale
from services.controller.core.records import Claimed
from services.controller.core.rollout_record import Rollout

# A record is some hundred bytes and a line for each state; more is no record.
RECORD_BYTES_MAX = 1 << 20
_MARK = "claimed"
# An operator wants to read what happened lately; older records only slow the start.
HISTORY_MAX = 200

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
        """See `RolloutRecords.claim`. A file that is no record is named in the log and passed over."""
        return await _told(lambda: self._claim(model, fence))

    async def save(self, rollout: Rollout) -> None:
        """See `RolloutRecords.save`."""
        await _told(lambda: self._save(rollout))

    def _claim(self, model: str, fence: int) -> Claimed:
        place = self._directory / model
        place.mkdir(parents=True, exist_ok=True)
        known, rollouts = _read_newest(place)
        number = max(fence, known[-1] + 1 if known else 0)
        # Under a name that is no number: half a copy is never taken for the records.
        fresh = Path(tempfile.mkdtemp(prefix=".claim-", dir=place))
        try:
            (fresh / _MARK).touch()
            for rollout in rollouts:
                _write(fresh / f"{rollout.id}.json", rollout)
            _sync(fresh)
            _give_name(fresh, place / str(number))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _sync(place)
        self._claims[model] = number
        for old in known:
            shutil.rmtree(place / str(old), ignore_errors=True)
        return Claimed(number, rollouts)

    def _save(self, rollout: Rollout) -> None:
        place = self._directory / rollout.spec.model
        number = self._claims[rollout.spec.model]
        directory = place / str(number)
        fresh = directory / f"{rollout.id}.new"
        try:
            _write(fresh, rollout)
            fresh.replace(fresh.with_suffix(".json"))
            _sync(directory)
        except FileNotFoundError:
            raise FenceStale(f"The records of {number} are gone: another controller took over.") from None
        if (highest := _numbers(place)[-1]) > number:
            raise FenceStale(f"A controller with the fence {highest} has taken the records over.")


async def _told(work: Callable[[], T]) -> T:
    """Runs `work` in a thread, to its end; what the disk refuses becomes our error."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise StoreUnavailable(f"The rollouts cannot be recorded: {error.strerror}.") from error


def _numbers(place: Path) -> list[int]:
    """The fencing numbers that claims were made with, in their order."""
    return sorted(int(entry.name) for entry in place.iterdir() if entry.name.isdecimal())


def _read_newest(place: Path) -> tuple[list[int], tuple[Rollout, ...]]:
    """The numbers, and what the highest one holds: all of it, also where others claim meanwhile."""
    while True:
        known = _numbers(place)
        rollouts = _read_all(place / str(known[-1])) if known else ()
        # Whoever claims removes what is below; until then nothing was missing.
        if _numbers(place) == known:
            return known, rollouts


def _read_all(directory: Path) -> tuple[Rollout, ...]:
    found = [record for file in directory.glob("*.json") if (record := _read(file)) is not None]
    found.sort(key=lambda record: (record.history[0].time_ms, record.id))
    return tuple(found[-HISTORY_MAX:])


def _write(file: Path, rollout: Rollout) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(asdict(rollout), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_name(fresh: Path, final: Path) -> None:
    try:
        fresh.rename(final)
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.ENOTEMPTY}:
            raise FenceStale(f"The number {final.name} was claimed by another controller.") from None
        raise


def _read(file: Path) -> Rollout | None:
    try:
        with file.open("rb") as stream:
            # A longer one is cut, and so no JSON.
            record = _RECORD.validate_json(stream.read(RECORD_BYTES_MAX))
    except (OSError, ValidationError):
        logs.get_logger().error("rollout.unreadable", file=file.name)
        return None
    return record if record.history else None
