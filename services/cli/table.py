"""Tables. Owns: how a command prints a list, for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool) -> None:
    """Prints `rows`.

    Args:
        rows: One mapping a line; `as_json` prints them whole.
        columns: Heading of each column that people see, by field.
        as_json: One JSON list instead of a table.
    """
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    lines = [list(columns.values()), *([str(row.get(field, "")) for field in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
