"""The race. Owns: who works when, so that a drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.race.child import ContestantFailed
from bench.race.process_memory import Memory
from bench.race.work import Figures, Work


@dataclass(frozen=True, slots=True)
class Sample:
    """One contestant's figures for one batch in one round."""

    contestant: str
    batch: int
    lap: int
    figures: Figures
    memory: Memory


@dataclass(frozen=True, slots=True)
class Course:
    """What is run.

    Attributes:
        prompts: As many as the largest batch; smaller ones take the first of them.
        new_tokens: Tokens of each answer.
        batches: By contestant, the batches that it runs.
        laps: How often everything is run.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    batches: Mapping[str, Sequence[int]]
    laps: int

    def starts(self) -> Iterator[tuple[int, int, str]]:
        """Lap, batch and contestant of every piece of work, in order.

        In a lap the batches only grow, so that the first lap's memory is that of the batch. For each batch
        the contestants take turns, and another one begins in every lap.
        """
        names = list(self.batches)
        sizes = sorted({batch for batches in self.batches.values() for batch in batches})
        for lap in range(self.laps):
            turn = lap % len(names)
            for batch in sizes:
                for name in names[turn:] + names[:turn]:
                    if batch in self.batches[name]:
                        yield lap, batch, name


class Starter(Protocol):
    """A contestant that can be told to work."""

    def measure(self, work: Work) -> tuple[Figures, Memory]:
        """Works; raises ContestantFailed when it cannot go on."""
        ...


def run(
    starters: Mapping[str, Starter],
    course: Course,
    on_start: Callable[[str, int, int], None],
    *,
    limit_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Sample], dict[str, str]]:
    """Runs the course. Who fails is left behind; the others go on.

    Args:
        starters: The contestants, by name.
        course: What is run.
        on_start: Hears the contestant, batch and lap of each piece of work before it.
        limit_s: No lap begins that would take the race beyond it, if it took as long as the longest so far.
            The first one always runs.
        clock: The time in seconds.

    Returns:
        What was measured, and by contestant why it failed.
    """
    samples: list[Sample] = []
    failed: dict[str, str] = {}
    began_s = lap_began_s = clock()
    longest_s, running = 0.0, 0
    for lap, batch, name in course.starts():
        if lap != running:
            now_s = clock()
            longest_s = max(longest_s, now_s - lap_began_s)
            if now_s + longest_s > began_s + limit_s:
                break
            running, lap_began_s = lap, now_s
        on_start(name, batch, lap)
        if name in failed:
            continue
        try:
            found, memory = starters[name].measure(Work(course.prompts[:batch], course.new_tokens))
        except ContestantFailed as error:
            failed[name] = f"batch {batch}, {error}"
        else:
            samples.append(Sample(name, batch, lap, found, memory))
    return samples, failed
