"""A measured section of a document. Owns: replacing what stands between its markers."""

from __future__ import annotations

from pathlib import Path


def replace_section(document: Path, name: str, text: str) -> None:
    """Puts `text` between the markers of section `name`; a document without them gets them at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = document.read_text() if document.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    before, found_begin, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if found_begin and found_end:
        document.write_text(before + section + after)
    else:
        document.write_text(f"{old.rstrip()}\n\n{section}\n".lstrip())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
