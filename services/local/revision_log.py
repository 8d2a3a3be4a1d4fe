"""What a controller logs of revisions. Owns: how a failure, and how far a model is read, is found in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.local.log_file import tail

# A start writes some fifty lines; what is older than this has been seen by an earlier look.
_LINES = 200


def failure(log: Path, from_byte: int, member_id: str) -> str | None:
    """Why the member could not prepare its revision, by the log since `from_byte`; None unless it failed."""
    for told in _told(log, from_byte, "revision.failed"):
        if member_id in {told.get("worker_id"), told.get("gateway_id")}:
            return str(told.get("reason") or "no reason was given")
    return None


def model_read(log: Path, from_byte: int) -> tuple[int, int] | None:
    """How many bytes of its model the controller has read, of how many; None where it has not said so."""
    told = list(_told(log, from_byte, "hashing.advanced"))
    return (int(told[-1]["read_bytes"]), int(told[-1]["size_bytes"])) if told else None


def _told(log: Path, from_byte: int, event: str) -> Iterator[dict[str, Any]]:
    """The last lines of an event, the oldest first."""
    for line in tail(log, _LINES, from_byte=from_byte, columns=None).splitlines():
        if event not in line:
            continue
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if told.get("event") == event:
            yield told
