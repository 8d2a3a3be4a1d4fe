"""The judge of rollouts. Owns: what gateways have counted of each revision, and since when it counts.

Gateways report counts that only grow while their process lives. Of each report the part that is new is added
here; the first one of a process says nothing about when its counts were made, and is only where the next one
begins. So a gateway that restarts loses nothing that was counted here, and a controller that takes over
judges by what it hears from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.clock import Clock
from services.controller.core.judgement import FIRST_TOKENS_ENOUGH, Finding, Rules, Tally, Verdict, judge
from services.controller.core.rollout_record import Rollout, State

# What the old revision did within this time before the switch is what the new one is compared with.
BASELINE_S = 600.0
# Looks that far apart bound how many of them are kept, and move the beginning of the baseline by as much.
LOOK_S = 10.0
# Golden prompts are asked before the switch; from then on, while it is judged, as often as this. They take a
# slot from requests for as long as a short answer takes.
PROVE_EVERY_S = 10.0
# More than a fleet has; beyond it, something reports under ever new names.
GATEWAYS_MAX = 1_000
# More than gateways report of at a time.
REVISIONS_MAX = 64

Tallies = Mapping[str, Tally]

_JUDGED = frozenset({State.SWITCHING, State.BAKING})


@dataclass(slots=True)
class _Window:
    """The time in which one rollout is judged.

    Attributes:
        rollout_id: The rollout.
        revision: The revision that is judged.
        totals: All that was counted when it began.
        before: What the old revision did before.
        asked_s: When golden prompts were asked last, or would have been, on the monotonic clock.
        shortcoming: Why a worker's answers to them fell short; empty: they have not.
    """

    rollout_id: str
    revision: str
    totals: dict[str, Tally]
    before: Tally
    asked_s: float
    shortcoming: str = ""


@dataclass(slots=True)
class Judge:
    """Hears gateways, and judges the rollout that is under way.

    Attributes:
        clock: The time.
    """

    clock: Clock
    _heard: dict[str, tuple[str, Tallies]] = field(default_factory=dict)
    _totals: dict[str, Tally] = field(default_factory=dict)
    _looks: deque[tuple[float, dict[str, Tally]]] = field(
        default_factory=lambda: deque(maxlen=int(BASELINE_S / LOOK_S))
    )
    _window: _Window | None = None

    def hear(self, gateway_id: str, incarnation: str, tallies: Tallies) -> None:
        """Takes in all that one gateway's process has counted so far, by revision."""
        process, known = self._heard.pop(gateway_id, ("", {}))
        self._heard[gateway_id] = (incarnation, tallies)
        while len(self._heard) > GATEWAYS_MAX:
            del self._heard[next(iter(self._heard))]
        if process == incarnation:
            for revision, tally in tallies.items():
                self._add(revision, tally.since(known.get(revision, Tally())))

    def look(self) -> None:
        """Remembers what was counted until now; called once a second."""
        now_s = self.clock.monotonic()
        if not self._looks or now_s - self._looks[-1][0] >= LOOK_S:
            self._looks.append((now_s, dict(self._totals)))

    def asks(self, rollout: Rollout) -> bool:
        """Whether it is time to ask the new revision its golden prompts again; called once a second."""
        window, now_s = self._window, self.clock.monotonic()
        judged = window is not None and window.rollout_id == rollout.id and rollout.state is State.BAKING
        if window is None or not judged or now_s - window.asked_s < PROVE_EVERY_S:
            return False
        window.asked_s = now_s
        return True

    def hear_proof(self, worker_id: str, revision: str, reason: str) -> None:
        """Takes in what came of golden prompts; an empty reason: they were answered."""
        if reason and self._window is not None and revision == self._window.revision:
            self._window.shortcoming = self._window.shortcoming or f"{worker_id}: {reason}"

    def verdict(self, rollout: Rollout) -> Verdict | None:
        """What is to be said of a rollout now; None: it is not judged where it is."""
        if rollout.state not in _JUDGED:
            self._window = None
            return None
        if self._window is None or self._window.rollout_id != rollout.id:
            before, now_s = self._before(rollout.previous), self.clock.monotonic()
            revision = rollout.spec.revision
            self._window = _Window(rollout.id, revision, dict(self._totals), before, now_s)
        if rollout.state is not State.BAKING:
            return None
        if self._window.shortcoming:
            return Verdict(Finding.BAD, self._window.shortcoming)
        new = self._since(self._window, rollout.spec.revision)
        old = self._since(self._window, rollout.previous)
        if old.first_tokens < FIRST_TOKENS_ENOUGH:
            # Beside a canary the old revision goes on under the same load; after a full switch it does not.
            old = old.plus(self._window.before)
        judged_s = self.clock.now() - rollout.history[-1].time_ms / 1000
        spec = rollout.spec
        rules = Rules(failed_percent_max=spec.failed_percent_max, ttft_ratio_max=spec.ttft_ratio_max)
        return judge(new, old, rules, judged_s)

    def _add(self, revision: str, tally: Tally) -> None:
        self._totals[revision] = self._totals.pop(revision, Tally()).plus(tally)
        while len(self._totals) > REVISIONS_MAX:
            del self._totals[next(iter(self._totals))]

    def _since(self, window: _Window, revision: str) -> Tally:
        return self._totals.get(revision, Tally()).since(window.totals.get(revision, Tally()))

    def _before(self, revision: str) -> Tally:
        """What a revision did lately."""
        earliest = self._looks[0][1] if self._looks else {}
        return self._totals.get(revision, Tally()).since(earliest.get(revision, Tally()))
