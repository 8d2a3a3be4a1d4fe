"""The documentation's diagrams are those of the tables."""

from __future__ import annotations

from tests.contract.diagrams import BEGIN, DOCUMENT, END, drawn


def test_the_diagram_of_a_rollout_is_that_of_its_table() -> None:
    """`python -m tests.contract.diagrams` draws it again."""
    text = DOCUMENT.read_text()
    assert BEGIN in text
    assert END in text
    assert drawn(text) == text
