"""Rollouts as files. Owns: how a record outlives its controller in a directory, one JSON file a rollout.

A record is written beside its final name, synced, and renamed: a reader sees the old one or the new one,
and a crash loses neither. Knows nothing of what a rollout does.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from services.common import logs
from services.common.errors import StoreUnavailable
from services.controller.core.rollout_record import Rollout

# A record is some hundred bytes and a line for each state; more is no record.
RECORD_BYTES_MAX = 1 << 20

_RECORD = TypeAdapter(Rollout)


class FileRolloutRecords:
    """`RolloutRecords` in a directory.

    Args:
        directory: Is made when the first record is saved.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def load(self, model: str) -> tuple[Rollout, ...]:
        """See `RolloutRecords.load`. A file that is no record is named in the log and passed over."""
        return await asyncio.to_thread(self._load, model)

    async def save(self, rollout: Rollout) -> None:
        """See `RolloutRecords.save`."""
        try:
            await asyncio.to_thread(self._save, rollout)
        except OSError as error:
            reason = f"The rollout cannot be recorded: {error.strerror}."
            raise StoreUnavailable(reason) from error

    def _load(self, model: str) -> tuple[Rollout, ...]:
        found = [record for file in self._directory.glob("*.json") if (record := _read(file)) is not None]
        ours = [record for record in found if record.spec.model == model]
        return tuple(sorted(ours, key=lambda record: (record.history[0].time_ms, record.id)))

    def _save(self, rollout: Rollout) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / f"{rollout.id}.json"
        fresh = file.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as stream:
            json.dump(asdict(rollout), stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _read(file: Path) -> Rollout | None:
    try:
        with file.open("rb") as stream:
            # A longer one is cut, and so no JSON.
            record = _RECORD.validate_json(stream.read(RECORD_BYTES_MAX))
    except (OSError, ValidationError):
        logs.get_logger().error("rollout.unreadable", file=file.name)
        return None
    return record if record.history else None
