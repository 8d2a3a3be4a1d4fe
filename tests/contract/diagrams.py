"""Draws the diagrams of the documentation from the tables that the services run on.

python -m tests.contract.diagrams          writes them into docs/architecture.md
"""

from __future__ import annotations

from pathlib import Path

from services.controller.core.rollout_record import NEXT, TERMINAL

DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"
BEGIN, END = "<!-- rollout: drawn from the table -->", "<!-- /rollout -->"


def rollout_diagram() -> str:
    """The states of a rollout, in Mermaid."""
    states = list(NEXT)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {states[0]}"]
    for state in states:
        following = sorted(NEXT[state], key=states.index)
        lines += [f"    {state} --> {one}" for one in following]
        if state in TERMINAL:
            lines.append(f"    {state} --> [*]")
    return "\n".join([*lines, "```"])


def drawn(text: str) -> str:
    """The document with its diagram as it shall be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{rollout_diagram()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(drawn(DOCUMENT.read_text()))
