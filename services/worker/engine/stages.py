"""Stages. Owns: which phase of a preparation runs, which stage of LOAD, and how long each took."""

from __future__ import annotations

from services.common.clock import Clock
from services.worker.core.revision import LoadStage, Phase


class Stages:
    """The stages of one preparation.

    Args:
        clock: Measures them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entered: list[tuple[Phase, float]] = []
        self._stage: LoadStage | None = None
        self._stage_began_s = 0.0
        self._stages_s: dict[LoadStage, float] = {}

    @property
    def phase(self) -> Phase:
        """The phase that runs; FETCH before the first has begun."""
        return self._entered[-1][0] if self._entered else Phase.FETCH

    def enter(self, phase: Phase) -> None:
        """Begins a phase."""
        self.turn_to(None)
        self._entered.append((phase, self._clock.monotonic()))

    def turn_to(self, stage: LoadStage | None) -> None:
        """Ends a stage and begins another; None: there is none from now on."""
        now_s = self._clock.monotonic()
        if self._stage is not None:
            passed_s = now_s - self._stage_began_s
            self._stages_s[self._stage] = self._stages_s.get(self._stage, 0.0) + passed_s
        self._stage, self._stage_began_s = stage, now_s

    def durations_s(self) -> tuple[tuple[str, float], ...]:
        """Seconds of each phase and stage, by name in lower case."""
        ends = [*(began_s for _, began_s in self._entered[1:]), self._clock.monotonic()]
        phases = [
            (phase.value.lower(), end_s - began_s)
            for (phase, began_s), end_s in zip(self._entered, ends, strict=True)
        ]
        return (*phases, *((stage.value, passed_s) for stage, passed_s in self._stages_s.items()))
