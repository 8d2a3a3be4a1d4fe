"""What the controller logs of revisions. Owns: how a member's failed preparation is found in its log."""

from __future__ import annotations

import json
from pathlib import Path

from services.local.log_file import tail

# A start writes some fifty lines; what is older than this has been seen by an earlier look.
_LINES = 200


def failure(log: Path, from_byte: int, member_id: str) -> str | None:
    """Why the member could not prepare its revision, by the log since `from_byte`; None unless it failed."""
    for line in tail(log, _LINES, from_byte=from_byte, columns=None).splitlines():
        if "revision.failed" not in line:
            continue
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if told.get("event") == "revision.failed" and member_id in {
            told.get("worker_id"),
            told.get("gateway_id"),
        }:
            return str(told.get("reason") or "no reason was given")
    return None
