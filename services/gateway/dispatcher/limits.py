"""Bounds of one request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationLimits:
    """Bounds of every request; the settings of the same names say why."""

    credit_tokens: int = 256
    client_stall_s: float = 30.0
    attempts_max: int = 3
    failover_wait_s: float = 15.0
    detach_grace_s: float = 60.0
