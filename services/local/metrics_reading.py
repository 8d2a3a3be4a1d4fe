"""The metrics of a process of the mesh. Owns: how its numbers are read from `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from services.local import probes

# What does not answer within this is not known, and nobody waits for it.
_TIMEOUT_S = 2.0
# A gateway's numbers fit into a small part of it.
_BYTES_MAX = 1 << 20


async def read(address: str) -> Mapping[str, float] | None:
    """The numbers without labels, by their names, of the process whose metrics are at `host:port`.

    None where they cannot be read: nobody listens there, or what answers shows no metrics.
    """
    if not address:
        return None
    asked = probes.http_ok(address, "/metrics", bytes_max=_BYTES_MAX)
    try:
        body = await asyncio.wait_for(asked, _TIMEOUT_S)
        if body is None:
            return None
        samples = [one for family in text_string_to_metric_families(body.decode()) for one in family.samples]
    except (OSError, ValueError):
        return None
    return {one.name: one.value for one in samples if not one.labels}
