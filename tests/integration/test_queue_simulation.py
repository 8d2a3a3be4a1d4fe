"""Random histories with faults: gateways that vanish, sleep and leave, lost answers, Redis emptied."""

from __future__ import annotations

import os
import random

import pytest

from tests.fixtures.queue_simulation import Simulation
from tests.fixtures.queue_world import QueueWorld

# Seeds and the steps of each: 10,000 in all. `make soak` takes several times as many seeds, and one history
# that is as long by itself.
STEPS = 500
FACTOR = int(os.environ.get("INTERLOCK_SOAK_FACTOR", "1"))
HISTORIES = [(seed, STEPS) for seed in range(20 * FACTOR)]
if FACTOR > 1:
    HISTORIES.append((1_000, 10_000))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "steps"), HISTORIES)
async def test_every_job_ends_once_whatever_fails(empty_world: QueueWorld, seed: int, steps: int) -> None:
    """After healing nothing waits, runs or is owned; every client was told one end; all books agree."""
    simulation = Simulation(empty_world, random.Random(seed))  # noqa: S311 - a history to repeat, no secret
    await simulation.begin()
    await simulation.run(steps)
    await simulation.end()
