"""How many rows a product takes. Owns: the counts to which others are filled up.

A matrix library makes a program for each number of rows that it meets, for each shape of weights, and that
takes as long as a step of decoding. Steps have any number of rows: without this an engine that has just
started is slow until it has met them all, and one whose library forgets is never fast.
"""

from __future__ import annotations

# Up to here each row is worth its own count; none takes longer than it takes to read the weights.
EXACT_ROWS = 4
STEP_MIN = 2
# Up to here reading the weights is most of the work, and a quarter more rows cost little.
LIGHT_ROWS = 32
LIGHT_PARTS = 4
PARTS = 8


def filled(rows: int) -> int:
    """The count to which `rows`, at least 1, are filled up.

    1, 2, 3, 4, 6, 8 and so on to 16, 20, 24, 28, 32, and from there an eighth of a power of two at a time.
    """
    if rows <= EXACT_ROWS:
        return rows
    below = 1 << ((rows - 1).bit_length() - 1)
    step = max(STEP_MIN, below // (LIGHT_PARTS if rows <= LIGHT_ROWS else PARTS))
    return -(-rows // step) * step


def counts(rows_max: int) -> tuple[int, ...]:
    """All counts up to the one that holds `rows_max`, ascending."""
    found: list[int] = []
    while not found or found[-1] < rows_max:
        found.append(filled(found[-1] + 1 if found else 1))
    return tuple(found)
