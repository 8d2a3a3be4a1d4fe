"""Fields that several vendors' APIs have. Owns: what bounds of theirs mean here that the mesh does not know.

Must not know: the other bounds of values; `core.validation` does.
"""

from __future__ import annotations

from typing import Any

from services.gateway.http import native_fields

# The smallest normal number of single precision, in which workers are told it; a smaller one may be 0.
TOP_P_MIN = 2.0**-126


def read_top_p(name: str, value: Any) -> float:
    """A share of the mass; of 0 the likeliest token is left, as of the smallest share that there is."""
    number = native_fields.read_number(name, value)
    return TOP_P_MIN if 0 <= number < TOP_P_MIN else number


def read_top_k(name: str, value: Any) -> int | None:
    """How many tokens are kept; 0 says what leaving it out says."""
    return native_fields.read_int32(name, value) or None
