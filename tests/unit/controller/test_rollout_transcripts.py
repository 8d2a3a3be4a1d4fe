"""Transcripts of rollouts: events in, effects out, as text that people can read and check.

A line that begins with `@` is an event: its time in seconds, its name, and what changed in the fleet before
it. The indented lines under it are what the table answers. `route` alone stands for what the store was
last told. Together the transcripts meet every entry of the table.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from services.controller.core.rollout import TABLE, RolloutEventIllegal, step
from services.controller.core.rollout_events import (
    Begun,
    Cancelled,
    Effect,
    Enter,
    Event,
    FellShort,
    Fleet,
    Observed,
    Paused,
    Promoted,
    Resumed,
    RouteWritten,
    SetRoute,
    Standing,
    Swap,
    TakenBack,
    WorkerView,
)
from services.controller.core.rollout_record import NEXT, Rollout, Spec, State, Strategy, create

TRANSCRIPTS = sorted(Path(__file__).with_name("transcripts").glob("*.txt"))

PLAIN: tuple[tuple[str, Event], ...] = (
    ("begun", Begun()),
    ("observed", Observed()),
    ("promoted", Promoted()),
    ("taken-back", TakenBack()),
    ("cancelled", Cancelled()),
    ("paused", Paused()),
    ("resumed", Resumed()),
)


class Player:
    """Plays one transcript, and writes down what comes of it."""

    def __init__(self) -> None:
        self.met: set[tuple[State, type]] = set()
        self._rollout: Rollout | None = None
        self._fleet: dict[str, WorkerView] = {}
        self._gateways = 0

    @property
    def rollout(self) -> Rollout:
        """The rollout as it stands."""
        assert self._rollout is not None
        return self._rollout

    def play(self, text: str) -> str:
        """The transcript with the answers that the table gives now."""
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("  "):
                continue
            lines.append(line)
            if line.startswith("spec"):
                self._rollout = create("r1", _spec(line.split()[1:]), "old", 0)
            elif line.startswith("@"):
                lines += [f"  {answer}" for answer in self._take(line)]
        return "\n".join(lines) + "\n"

    def _take(self, line: str) -> list[str]:
        head, _, fleet = line.partition("|")
        time, name, *words = head.split()
        self._change_fleet(fleet)
        event = self._event(name, words)
        self.met.add((self.rollout.state, type(event)))
        seen = Fleet(tuple(self._fleet[name] for name in sorted(self._fleet)), self._gateways)
        try:
            taken = step(self.rollout, event, seen, round(float(time[1:]) * 1000))
        except RolloutEventIllegal as error:
            return [f"illegal: {error}"]
        self._rollout = taken.rollout
        return [_written(effect) for effect in taken.effects]

    def _event(self, name: str, words: list[str]) -> Event:
        if name == "route":
            weights = tuple((one, int(share)) for one, _, share in (word.partition("=") for word in words))
            return RouteWritten(weights or self.rollout.route)
        if name == "fell-short":
            return FellShort(" ".join(words))
        return dict(PLAIN)[name]

    def _change_fleet(self, text: str) -> None:
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, *words = part.split()
            if name == "gateways-pending":
                self._gateways = int(words[0])
            elif words == ["gone"]:
                del self._fleet[name]
            else:
                self._fleet[name] = _changed(self._fleet.get(name, WorkerView(name)), words)


def _changed(worker: WorkerView, words: list[str]) -> WorkerView:
    for word in words:
        field, _, value = word.partition("=")
        match field:
            case "new":
                worker = replace(worker, new=Standing(value))
            case "old":
                worker = replace(worker, old=Standing(value))
            case "fits":
                worker = replace(worker, fits=value == "yes")
            case "failure":
                worker = replace(worker, failure=value.replace("_", " "))
            case "old-failure":
                worker = replace(worker, old_failure=value.replace("_", " "))
    return worker


def _spec(words: list[str]) -> Spec:
    fields = dict(word.split("=") for word in words)
    return Spec(
        model="demo",
        revision="new",
        strategy=Strategy(fields.get("strategy", "auto")),
        canary_percent=int(fields.get("canary", 100)),
        bake_s=float(fields.get("bake", 60)),
        drain_timeout_s=float(fields.get("drain", 600)),
        quorum=int(fields["quorum"]) if "quorum" in fields else None,
    )


def _written(effect: Effect) -> str:
    match effect:
        case Enter(state, cause):
            return f"{state}: {cause}"
        case SetRoute(weights):
            return "route " + " ".join(f"{name}={share}" for name, share in weights)
        case Swap(worker_id):
            return f"swap {worker_id}"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_table_answers_as_it_is_written(path: Path) -> None:
    """Every effect, in its order, with its words."""
    text = path.read_text()
    assert Player().play(text) == text


def test_the_transcripts_meet_every_entry_of_the_table() -> None:
    """An entry that no transcript shows is one that nobody has read."""
    met: set[tuple[State, type]] = set()
    for path in TRANSCRIPTS:
        player = Player()
        player.play(path.read_text())
        met |= player.met
    assert set(TABLE) <= met


def test_a_record_rests_while_nothing_happens() -> None:
    """Also where the last worker is gone: one that changed with each look would be saved without an end."""
    spec = Spec(model="demo", revision="new", strategy=Strategy.SWAP)
    rollout = step(create("r1", spec, "old", 0), Begun(), Fleet((), 0), 0).rollout
    for worker in ((), (WorkerView("w1", Standing.PREPARING, Standing.READY),)):
        seen = step(rollout, Observed(), Fleet(worker, 0), 1_000).rollout
        assert step(seen, Observed(), Fleet(worker, 0), 2_000).rollout == seen


def test_the_transcripts_go_every_way_of_the_diagram() -> None:
    """A way that no transcript goes is one that nobody has seen."""
    gone: set[tuple[State, State]] = set()
    for path in TRANSCRIPTS:
        player = Player()
        player.play(path.read_text())
        gone |= set(pairwise(one.state for one in player.rollout.history))
    assert gone == {(state, one) for state, following in NEXT.items() for one in following}
