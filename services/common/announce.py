"""Announcements. Owns: how a process tells its supervisor that it listens, and where."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write(path: Path | None, *, id: str, address: str, metrics: str = "") -> None:  # noqa: A002 - the field's name
    """Writes `{"id", "address", "pid", "metrics"}` to `path` in one step; None: nobody wants to know."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"id": id, "address": address, "pid": os.getpid(), "metrics": metrics}
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
