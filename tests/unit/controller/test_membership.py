"""The life of a member: a golden transcript of it, and what no sequence of events can bring about."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.core.commands import (
    EndStream,
    RemoveWorker,
    SendAbort,
    SendActivate,
    SendDrain,
    SendPrepare,
    SendStage,
    WriteWorker,
)
from services.controller.core.member import (
    Activated,
    DrainAsked,
    Event,
    Failed,
    Farewell,
    Goal,
    Hello,
    Kind,
    Load,
    LoadReport,
    Member,
    Presence,
    Progress,
    Ready,
    Retired,
    Silence,
    Staged,
    StreamBroken,
    Tick,
)
from services.controller.core.membership import RETRY_AFTER_S, TABLE, Rules, step
from services.controller.core.residency import TABLE as RESIDENCY
from services.controller.core.residency import EventIllegal, Phase, Resident

TRANSCRIPT = Path(__file__).parent / "attach.transcript"
RULES = Rules(lease_ttl_s=5.0, prepare_timeout_s=600.0, fence=3)
GOAL = Goal("m", {"r1": 100})
WORKER = Member(Kind.WORKER, "w")


def replay(text: str) -> str:
    """Runs the events of a transcript and returns it with the effects that really came."""
    member, goal, lines = WORKER, GOAL, []
    for line in text.splitlines():
        if not line.startswith(">"):
            if not line.startswith("  "):
                lines.append(line)
            continue
        lines.append(line)
        _, second, name, *words = line.split(" ")
        if name == "goal":
            goal = dataclasses.replace(goal, holds={"r1": int(words[0].removeprefix("epoch="))})
            continue
        taken = step(member, parse(name, words), goal, float(second), RULES)
        member = taken.member
        lines += [f"  {show(effect)}" for effect in taken.effects]
    return "\n".join(lines) + "\n"


def parse(name: str, words: list[str]) -> Event:
    """The event that a line of the transcript names."""
    values = dict(word.split("=") for word in words if "=" in word)
    match name:
        case "hello":
            holds = {"r1": Resident(phase=Phase(values["holds"]))} if "holds" in values else {}
            return Hello(Kind.WORKER, "w", values["incarnation"], "h:1", 8, residents=holds)
        case "load":
            return LoadReport(Load(slots=int(values.get("slots", "8"))))
        case "progress":
            return Progress("r1", words[0], 1, 2)
        case "activated":
            return Activated("r1", int(values["epoch"]))
        case "failed":
            return Failed("r1", words[0], " ".join(words[1:]))
    events: dict[str, Event] = {
        "ready": Ready("r1", 10),
        "retired": Retired("r1"),
        "broken": StreamBroken(),
        "farewell": Farewell(),
        "silence": Silence(),
        "drain": DrainAsked(30.0),
        "tick": Tick(),
    }
    return events[name]


def show(effect: object) -> str:
    """An effect as the transcript writes it; empty texts of notes are left out."""
    assert dataclasses.is_dataclass(effect)
    assert not isinstance(effect, type)
    name = type(effect).__name__
    values = {field.name: getattr(effect, field.name) for field in dataclasses.fields(effect)}
    shown = [f"{key}={value}" for key, value in values.items() if value != "" or name != "Note"]
    return " ".join([name, *shown])


def test_transcript() -> None:
    """A worker's whole life brings exactly the effects that the transcript lists, in their order."""
    text = TRANSCRIPT.read_text()
    assert replay(text) == text


EVENTS = st.one_of(
    st.builds(
        lambda incarnation, holds: Hello(Kind.WORKER, "w", incarnation, "h:1", 8, residents=holds),
        st.sampled_from(["a", "b"]),
        st.sampled_from([{}, *({"r1": Resident(phase)} for phase in Phase if phase is not Phase.ABSENT)]),
    ),
    st.sampled_from([LoadReport(Load(slots=8)), LoadReport(Load(slots=0))]),
    st.sampled_from([Progress("r1", "load", 1, 2), Progress("r2", "load", 1, 2)]),
    st.sampled_from([Staged("r1"), Staged("r2"), Ready("r1", 1), Ready("r2", 1)]),
    st.sampled_from([Activated("r1", 100), Activated("r2", 100)]),
    st.sampled_from([Failed("r1", "load", "no"), Retired("r1"), Retired("r2")]),
    st.sampled_from([StreamBroken(), Farewell(), Silence(), DrainAsked(1.0), Tick()]),
)


GOALS = st.sampled_from([GOAL, GOAL, Goal("m", {}, stages=frozenset({"r1"})), Goal("m", {})])


@given(st.lists(st.tuples(EVENTS, GOALS, st.sampled_from([0.0, 1.0, 10.0, 700.0])), max_size=40))
@settings(max_examples=300)
def test_no_illegal_state(events: list[tuple[Event, Goal, float]]) -> None:
    """Whatever comes: gateways were told what the worker is, and only steps of the tables happen."""
    member, now_s, listed = WORKER, 0.0, False
    for event, goal, delay_s in events:
        now_s += delay_s
        try:
            taken = step(member, event, goal, now_s, RULES)
        except EventIllegal:
            continue
        for effect in taken.effects:
            if isinstance(effect, WriteWorker | RemoveWorker):
                listed = isinstance(effect, WriteWorker)
        assert listed is (taken.member.listing is not None)
        assert TABLE[member.presence, type(event)] is taken.member.presence
        prepares = [effect for effect in taken.effects if isinstance(effect, SendPrepare)]
        activates = [effect for effect in taken.effects if isinstance(effect, SendActivate)]
        stages = [effect for effect in taken.effects if isinstance(effect, SendStage)]
        assert len(prepares) + len(stages) + len(activates) <= 1
        if prepares:
            assert goal.holds
            assert taken.member.residents["r1"].phase is Phase.PREPARING
        if stages:
            assert goal.stages
            assert taken.member.residents["r1"].phase is Phase.STAGING
        if activates:
            assert taken.member.residents["r1"].phase in {Phase.ACTIVATING, Phase.ACTIVE}
        if taken.member.presence is Presence.LOST:
            assert taken.member.listing is None
        member = taken.member


def test_active_only_after_ready() -> None:
    """No step leads to ACTIVE but from ACTIVATING, and none to ACTIVATING but from READY."""
    into = {(before, after) for (before, _), after in RESIDENCY.items() if before is not after}
    assert {before for before, after in into if after is Phase.ACTIVE} == {Phase.ACTIVATING}
    assert {before for before, after in into if after is Phase.ACTIVATING} == {Phase.READY}


STAGE = Goal("m", {}, "roll", stages=frozenset({"r1"}))


def test_a_revision_is_staged_before_it_may_be_loaded() -> None:
    """Its files come first, with no load; it is loaded when the goal says so, or forgotten."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), None, 0.0, RULES).member
    taken = step(member, Tick(), STAGE, 1.0, RULES)
    assert SendStage("m", "r1", "roll") in taken.effects
    for event in (Progress("r1", "fetch", 1, 2), Staged("r1"), Tick()):
        taken = step(taken.member, event, STAGE, 2.0, RULES)
        assert not any(isinstance(effect, SendPrepare | SendStage) for effect in taken.effects)
    assert taken.member.residents["r1"].phase is Phase.STAGED
    loaded = step(taken.member, Tick(), GOAL, 3.0, RULES)
    assert SendPrepare("m", "r1", "") in loaded.effects
    dropped = step(taken.member, Tick(), Goal("m", {}), 3.0, RULES)
    assert SendAbort("r1") in dropped.effects
    assert not step(dropped.member, Retired("r1"), Goal("m", {}), 4.0, RULES).member.residents


def test_what_is_being_loaded_is_not_merely_staged() -> None:
    """A goal that wants its files alone ends a load: there may be no memory for it."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), GOAL, 0.0, RULES).member
    assert member.residents["r1"].phase is Phase.PREPARING
    assert SendAbort("r1") in step(member, Tick(), STAGE, 1.0, RULES).effects


def test_a_word_that_crossed_is_asked_again() -> None:
    """A worker that was still staging when it was told to load says so, and is told again."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), STAGE, 0.0, RULES).member
    late = step(member, Tick(), STAGE, 700.0, RULES)
    assert (late.member.residents["r1"].phase, SendAbort("r1") in late.effects) == (Phase.FAILED, True)
    asked = step(late.member, Tick(), GOAL, 720.0, RULES)
    assert SendPrepare("m", "r1", "") in asked.effects
    again = step(asked.member, Staged("r1"), GOAL, 721.0, RULES)
    assert SendPrepare("m", "r1", "") in again.effects


@pytest.mark.parametrize("goal", [GOAL, STAGE])
def test_a_word_of_what_we_gave_up_is_no_goodbye(goal: Goal) -> None:
    """What took too long is asked for again; that the first attempt has ended by now takes nobody out."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), goal, 0.0, RULES).member
    late = step(member, Tick(), goal, 600.0, RULES)
    assert SendAbort("r1") in late.effects
    again = step(late.member, Tick(), goal, 606.0, RULES)
    ended = step(again.member, Retired("r1"), goal, 607.0, RULES)
    assert not ended.member.draining
    # The worker may have read them in the other order: to hear it twice costs nothing.
    assert any(isinstance(effect, SendPrepare | SendStage) for effect in ended.effects)
    back = Hello(Kind.WORKER, "w", "a", "h:1", 8, residents=dict(ended.member.residents))
    back_again = step(ended.member, back, goal, 608.0, RULES)
    assert not any(isinstance(effect, SendDrain) for effect in back_again.effects)


def test_a_word_of_what_is_wanted_no_more_is_legal() -> None:
    """It took too long, and then the rollout ended: the late answer to the abort ends no stream."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), STAGE, 0.0, RULES).member
    failed = step(member, Tick(), STAGE, 600.0, RULES).member
    dropped = step(failed, Tick(), Goal("m", {}), 601.0, RULES).member
    heard = step(dropped, Retired("r1"), Goal("m", {}), 602.0, RULES).member
    assert heard == dataclasses.replace(dropped, lease_end_s=607.0)
    staged = step(failed, Staged("r1"), STAGE, 601.0, RULES).member
    assert SendStage("m", "r1", "roll") in step(staged, Retired("r1"), STAGE, 602.0, RULES).effects


@pytest.mark.parametrize(
    ("said", "rollout", "failed"),
    [
        ((Progress("r1", "load", 1, 2),), "roll", True),
        ((Progress("r1", "load", 1, 2), StreamBroken(), Silence()), "roll", True),
        # It ended in order, or before it took any memory, or the mesh has nothing else to serve.
        ((Progress("r1", "load", 1, 2), Retired("r1")), "roll", False),
        ((Progress("r1", "load", 1, 2), LoadReport(Load(slots=0))), "roll", False),
        ((Progress("r1", "fetch", 1, 2),), "roll", False),
        ((Progress("r1", "load", 1, 2),), "", False),
    ],
)
def test_a_process_that_dies_of_a_load_is_not_killed_again(
    said: tuple[Event, ...], rollout: str, *, failed: bool
) -> None:
    """The kernel ends a process that takes too much memory: the rollout hears of it, and may end."""
    goal = Goal("m", {"r1": 100}, rollout)
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), goal, 0.0, RULES).member
    for event in said:
        member = step(member, event, goal, 1.0, RULES).member
    taken = step(member, Hello(Kind.WORKER, "w", "b", "h:1", 8), goal, 2.0, RULES)
    resident = taken.member.residents["r1"]
    assert (resident.phase is Phase.FAILED) is failed
    assert ("memory" in resident.failure) is failed
    assert (SendPrepare("m", "r1", rollout) in taken.effects) is not failed


def test_illegal_event_raises() -> None:
    """A member that calls a revision ready which nobody asked for breaks the protocol."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), None, 0.0, RULES).member
    with pytest.raises(EventIllegal, match="ABSENT"):
        step(member, Ready("r1", 1), None, 1.0, RULES)


def test_replaced_process_is_unlisted() -> None:
    """A new process under an old name is removed for gateways until it has prepared the revision."""
    holds = {"r1": Resident(Phase.ACTIVE)}
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8, residents=holds), GOAL, 0.0, RULES).member
    assert member.listing is not None
    taken = step(member, Hello(Kind.WORKER, "w", "b", "h:1", 8), GOAL, 1.0, RULES)
    assert RemoveWorker("w") in taken.effects
    assert not any(isinstance(effect, EndStream) for effect in taken.effects)


def test_retries_end() -> None:
    """A preparation that always fails is tried a fixed number of times, reconnections included."""
    member = step(WORKER, Hello(Kind.WORKER, "w", "a", "h:1", 8), GOAL, 0.0, RULES).member
    asked, now_s = 1, 0.0
    for _ in range(20):
        if member.residents["r1"].phase is Phase.PREPARING:
            member = step(member, Failed("r1", "load", "no"), GOAL, now_s, RULES).member
        now_s += 150.0
        again = Hello(Kind.WORKER, "w", "a", "h:1", 8, residents=dict(member.residents))
        for event in (again, Tick()):
            taken = step(member, event, GOAL, now_s, RULES)
            asked += sum(isinstance(effect, SendPrepare) for effect in taken.effects)
            member = taken.member
    assert asked == len(RETRY_AFTER_S) + 1


def test_gateway_is_never_listed() -> None:
    """Only workers get records, whatever a gateway holds."""
    hello = Hello(Kind.GATEWAY, "g", "a", residents={"r1": Resident(Phase.ACTIVE)})
    taken = step(Member(Kind.GATEWAY, "g"), hello, GOAL, 0.0, RULES)
    assert taken.member.listing is None
    assert SendActivate("m", "r1", 100) in taken.effects
