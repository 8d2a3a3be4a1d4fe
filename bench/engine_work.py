"""How many streams the engines of workers carry, by their own count. Owns: reading and comparing it.

Tokens/s are that number over the time of a step. How long a step takes is the machine's, which drifts; how
many streams are in it, and how much of the time there is one, is what the mesh makes of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from services.local import metrics_reading

_STEPS, _TOKENS, _STEP_S = (f"interlock_worker_{name}_total" for name in ("steps", "tokens", "step_seconds"))

Engines = Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Count:
    """What one engine has done at one moment.

    Attributes:
        at_s: When, of the monotonic clock.
        steps: Forward passes.
        tokens: What they yielded.
        step_s: How long they took together.
    """

    at_s: float
    steps: float
    tokens: float
    step_s: float


Reading = Mapping[str, Count]


def nobody() -> Iterable[str]:
    """The engines of a mesh that is not known."""
    return ()


async def read(addresses: Iterable[str]) -> Reading:
    """What the engines have done whose metrics are at these addresses (`host:port`); not of silent ones."""
    asked = tuple(addresses)
    found = await asyncio.gather(*(_count(address) for address in asked))
    return {address: count for address, count in zip(asked, found, strict=True) if count is not None}


def streams_between(before: Reading, after: Reading) -> float | None:
    """Streams in a step at any moment, in the mean over the time: a step yields a token of each.

    None where an engine is not known throughout.
    """
    if not after or before.keys() != after.keys():
        return None
    found = [_streams(before[address], after[address]) for address in after]
    return None if None in found else round(sum(one for one in found if one is not None), 3)


def _streams(before: Count, after: Count) -> float | None:
    steps, elapsed_s = after.steps - before.steps, after.at_s - before.at_s
    if steps < 0 or elapsed_s <= 0:
        # It was started anew.
        return None
    return (after.tokens - before.tokens) / max(steps, 1) * (after.step_s - before.step_s) / elapsed_s


async def _count(address: str) -> Count | None:
    told = await metrics_reading.read(address)
    if told is None or not told.keys() >= {_STEPS, _TOKENS, _STEP_S}:
        return None
    return Count(time.monotonic(), told[_STEPS], told[_TOKENS], told[_STEP_S])
