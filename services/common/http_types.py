"""Content types of bodies by HTTP. Owns: how gateways and controllers name them."""

from __future__ import annotations

JSON_TYPE = "application/json"
# The character set is said, though the type has no other: HTTP libraries exist that guess one.
EVENTS_TYPE = "text/event-stream; charset=utf-8"
