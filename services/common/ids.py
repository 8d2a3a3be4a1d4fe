"""Identifiers. Owns: which ids are well-formed, and how new ones are drawn."""

from __future__ import annotations

import re
import secrets

# The alphabet of the contract: safe in Redis keys, metadata, logs and file names.
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_valid_id(text: str) -> bool:
    """Whether `text` may name a request, a worker or a gateway: `[A-Za-z0-9._-]{1,64}`."""
    return _ID.fullmatch(text) is not None


def new_request_id() -> str:
    """A request id that nobody else draws: 128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def new_incarnation() -> str:
    """Names one process, so that a restart under the same id is seen: 64 random bits."""
    return secrets.token_hex(8)
