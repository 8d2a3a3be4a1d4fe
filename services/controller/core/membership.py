"""One member's life. Owns: the table of its presence, and what follows from everything that it says.

`step` takes a member, an event, the goal and the time, and returns the member after it with the effects.
Two rules: an event that a table does not list raises `EventIllegal` and changes nothing; and a worker is
listed for gateways exactly while it is there with an ACTIVE revision: the listing is derived, never set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from services.controller.core.commands import (
    Effect,
    EndStream,
    Note,
    RemoveWorker,
    SendAbort,
    SendActivate,
    SendDrain,
    SendLease,
    SendPrepare,
    SendRetire,
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
    LoadReport,
    Member,
    Presence,
    Progress,
    Ready,
    RetireAsked,
    Retired,
    Silence,
    Staged,
    StreamBroken,
    Tick,
)
from services.controller.core.residency import EventIllegal, Phase, Resident, Turn

# A preparation that failed for a passing cause (a full disk, a lost download) is tried again, ever more
# slowly, and then left alone until the member's process is replaced.
RETRY_AFTER_S = (5.0, 15.0, 45.0, 120.0)

_SPEECH = (LoadReport, Progress, Staged, Ready, Activated, Failed, Retired)

_CRASHED = "Its process ended while it loaded the revision; there may not be enough memory for it."

_RevisionReport: TypeAlias = Progress | Staged | Ready | Activated | Failed | Retired

_A, _D, _L, _U = Presence.ATTACHED, Presence.DETACHED, Presence.LOST, Presence.UNKNOWN

TABLE = MappingProxyType(
    {
        (_U, Hello): _A,
        (_A, Hello): _A,
        (_D, Hello): _A,
        (_L, Hello): _A,
        **{(_A, kind): _A for kind in _SPEECH},
        (_A, StreamBroken): _D,
        (_A, Farewell): _L,
        (_A, Silence): _L,
        (_D, Silence): _L,
        (_A, DrainAsked): _A,
        (_D, DrainAsked): _D,
        (_A, RetireAsked): _A,
        (_A, Tick): _A,
        (_D, Tick): _D,
        (_L, Tick): _L,
    }
)


@dataclass(frozen=True, slots=True)
class Rules:
    """How patient the controller is.

    Attributes:
        lease_ttl_s: How long a member may be silent.
        prepare_timeout_s: How long one preparation may take; a goal may allow more.
        fence: Fencing number of this controller.
    """

    lease_ttl_s: float
    prepare_timeout_s: float
    fence: int


@dataclass(frozen=True, slots=True)
class Step:
    """A member after an event, and what must be done, in this order."""

    member: Member
    effects: tuple[Effect, ...]


def step(member: Member, event: Event, goal: Goal | None, now_s: float, rules: Rules) -> Step:
    """What follows from `event`.

    Args:
        member: The member before it.
        event: What happened.
        goal: What the member shall hold; None: nothing yet.
        now_s: The monotonic time.
        rules: How patient we are.

    Raises:
        EventIllegal: The event cannot follow what was before.
    """
    presence = TABLE.get((member.presence, type(event)))
    if presence is None:
        raise EventIllegal(f"A member that is {member.presence} cannot send {type(event).__name__!r}.")
    if goal is not None and goal.prepare_timeout_s > rules.prepare_timeout_s:
        rules = replace(rules, prepare_timeout_s=goal.prepare_timeout_s)
    effects: list[Effect] = []
    after = _apply(replace(member, presence=presence), event, now_s, rules, effects)
    if isinstance(event, (Hello, *_SPEECH)):
        after = replace(after, lease_end_s=now_s + rules.lease_ttl_s)
    if isinstance(event, Hello) and goal is not None and goal.rollout_id:
        after = _note_crash(member, after, now_s, effects)
    if isinstance(event, Silence) and goal is not None:
        after = replace(after, lost_during=goal.rollout_id)
    if after.presence is Presence.ATTACHED:
        after = _pursue(after, goal, now_s, rules, effects)
    return Step(after, (*effects, *_listing_effects(member, after)))


def _apply(member: Member, event: Event, now_s: float, rules: Rules, effects: list[Effect]) -> Member:
    match event:
        case Hello():
            return _greet(member, event, now_s, rules, effects)
        case LoadReport(load=load):
            return replace(member, load=load, slots=load.slots)
        case Progress() | Staged() | Ready() | Activated() | Failed() | Retired():
            return _hear(member, event, now_s, effects)
        case DrainAsked(grace_s):
            effects += [SendDrain(grace_s), Note("member.draining")]
            return replace(member, drain_grace_s=grace_s)
        case RetireAsked(revision):
            return _retire(member, revision, effects)
        case StreamBroken():
            effects.append(Note("member.detached"))
        case Farewell():
            effects.append(Note("member.left"))
        case Silence():
            effects += [Note("member.lost"), EndStream("The lease ran out.")]
        case Tick():
            pass
    return member


def _greet(member: Member, hello: Hello, now_s: float, rules: Rules, effects: list[Effect]) -> Member:
    """A member after its hello: what it says of itself replaces all that was known, but for the drain."""
    same_process = member.incarnation == hello.incarnation
    event = "member.reattached" if same_process else "member.attached"
    effects += [SendLease(rules.lease_ttl_s, rules.fence), Note(event)]
    drain_grace_s = member.drain_grace_s if same_process else None
    if drain_grace_s is not None:
        effects.append(SendDrain(drain_grace_s))
    known = member.residents if same_process else {}
    return Member(
        kind=hello.kind,
        id=hello.id,
        incarnation=hello.incarnation,
        address=hello.address,
        slots=hello.slots,
        devices=hello.devices,
        presence=member.presence,
        drain_grace_s=drain_grace_s,
        residents={
            name: _resume(found, known.get(name), now_s, rules) for name, found in hello.residents.items()
        },
        epoch=hello.epoch,
        attached_s=now_s,
    )


def _note_crash(before: Member, after: Member, now_s: float, effects: list[Effect]) -> Member:
    """A member whose process ended while it loaded for a rollout; to load at once might end it again.

    One that was told to end has drained, and its end says nothing of what it loaded. What had failed in this
    one before counts on: by turns two revisions would end one process after the other for ever.
    """
    loading = any(resident.loading for resident in before.residents.values())
    is_another = before.incarnation != after.incarnation and before.kind is Kind.WORKER
    if not is_another or before.draining or not loading:
        return after
    for revision, resident in before.residents.items():
        if revision in after.residents:
            continue
        if resident.loading:
            failed = _fail(resident, Turn.FAIL, resident.step, _CRASHED, now_s)
            effects.append(Note("revision.failed", revision, failed.failure))
            after = _with(after, revision, failed)
        elif resident.phase is Phase.FAILED:
            after = _with(after, revision, resident)
    return after


def _resume(found: Resident, known: Resident | None, now_s: float, rules: Rules) -> Resident:
    """A revision that a member brings along; a reconnection neither prolongs a wait nor forgets attempts."""
    if known is not None and known.phase is found.phase:
        return replace(found, due_s=known.due_s, attempts=known.attempts)
    patience_s = RETRY_AFTER_S[0] if found.phase is Phase.FAILED else rules.prepare_timeout_s
    return replace(found, due_s=now_s + patience_s, attempts=known.attempts if known else 1)


def _hear(
    member: Member,
    event: _RevisionReport,
    now_s: float,
    effects: list[Effect],
) -> Member:
    """A member after it spoke of one revision."""
    before = member.residents.get(event.revision, Resident())
    resident = _resident_after(before, event, now_s)
    if resident.phase is not before.phase:
        effects.append(Note(f"revision.{_PAST[resident.phase]}", event.revision, resident.failure))
    if isinstance(event, Activated):
        member = replace(member, epoch=max(member.epoch, event.epoch))
    if isinstance(event, Retired) and before.phase in _HELD:
        # Nobody asked for it: the member is leaving, and asking it to prepare again would hold it up. Of what
        # it prepares it may say so for an abort that our next request has overtaken; then it is asked again.
        effects.append(Note("member.draining"))
        member = replace(member, drain_grace_s=0.0)
    return _with(member, event.revision, resident)


def _resident_after(before: Resident, event: _RevisionReport, now_s: float) -> Resident:
    match event:
        case Progress(_, step_name, done_bytes, total_bytes):
            resident = before.after(Turn.PROGRESS)
            return replace(resident, step=step_name, done_bytes=done_bytes, total_bytes=total_bytes)
        case Staged():
            # To load it is another matter, with attempts of its own.
            return replace(before.after(Turn.STAGED), failure="", attempts=0)
        case Ready(_, weights_bytes):
            return replace(before.after(Turn.READY), weights_bytes=weights_bytes, failure="")
        case Failed(_, step_name, reason):
            return _fail(before, Turn.FAIL, step_name, reason, now_s)
        case Activated():
            return before.after(Turn.ACTIVATED)
        case _:
            return before.after(Turn.RETIRED)


_PAST = {
    Phase.ABSENT: "retired",
    Phase.STAGING: "requested",
    Phase.STAGED: "staged",
    Phase.PREPARING: "requested",
    Phase.READY: "prepared",
    Phase.ACTIVATING: "announced",
    Phase.ACTIVE: "activated",
    Phase.RETIRING: "retiring",
    Phase.ABORTING: "aborting",
    Phase.FAILED: "failed",
}


def _fail(before: Resident, turn: Turn, step_name: str, reason: str, now_s: float) -> Resident:
    """A revision that failed; `due_s` becomes the moment of the next attempt."""
    resident = before.after(turn)
    tried = min(max(before.attempts, 1), len(RETRY_AFTER_S))
    return replace(resident, step=step_name, failure=reason, due_s=now_s + RETRY_AFTER_S[tried - 1])


def _pursue(member: Member, goal: Goal | None, now_s: float, rules: Rules, effects: list[Effect]) -> Member:
    """Brings an attached member one step nearer to the goal."""
    if goal is None or member.draining:
        return member
    for revision, epoch in goal.holds.items():
        resident = member.residents.get(revision, Resident())
        resident = _pursue_one(resident, goal, revision, epoch, now_s, rules, effects)
        member = _with(member, revision, resident)
    for revision in sorted(goal.stages):
        resident = member.residents.get(revision, Resident())
        member = _with(member, revision, _stage_one(resident, goal, revision, now_s, rules, effects))
    for revision in [name for name in member.residents if name not in goal.holds]:
        if revision not in goal.stages or member.residents[revision].phase not in _STAGEABLE:
            member = _let_go(member, revision, effects)
    return replace(member, quiet=goal.quiet)


def _pursue_one(
    resident: Resident,
    goal: Goal,
    revision: str,
    epoch: int,
    now_s: float,
    rules: Rules,
    effects: list[Effect],
) -> Resident:
    """Brings one revision of a member one step nearer to the goal."""
    if _is_overdue(resident, now_s):
        resident = _time_out(resident, revision, now_s, effects)
    elif resident.phase in {Phase.ABSENT, Phase.STAGED} or _is_due_again(resident, now_s):
        resident = _ask(resident, Turn.PREPARE, now_s, rules)
        effects += [SendPrepare(goal.model, revision, goal.rollout_id), Note("revision.requested", revision)]
    elif resident.phase in _HELD and resident.epoch < epoch:
        resident = replace(resident.after(Turn.ACTIVATE), epoch=epoch)
        effects.append(SendActivate(goal.model, revision, epoch))
    return resident


def _stage_one(
    resident: Resident, goal: Goal, revision: str, now_s: float, rules: Rules, effects: list[Effect]
) -> Resident:
    """Brings one revision of a worker nearer to having its files."""
    if _is_overdue(resident, now_s):
        return _time_out(resident, revision, now_s, effects)
    if resident.phase is Phase.ABSENT or _is_due_again(resident, now_s):
        effects += [SendStage(goal.model, revision, goal.rollout_id), Note("revision.requested", revision)]
        return _ask(resident, Turn.STAGE, now_s, rules)
    return resident


def _ask(resident: Resident, turn: Turn, now_s: float, rules: Rules) -> Resident:
    # Without `due_s` a member that never answers would be waited for without end.
    due_s, attempts = now_s + rules.prepare_timeout_s, resident.attempts + 1
    return replace(resident.after(turn), due_s=due_s, attempts=attempts, failure="")


def _is_overdue(resident: Resident, now_s: float) -> bool:
    return resident.phase in {Phase.STAGING, Phase.PREPARING} and resident.due_s <= now_s


def _time_out(resident: Resident, revision: str, now_s: float, effects: list[Effect]) -> Resident:
    resident = _fail(resident, Turn.TIMEOUT, resident.step, "It took longer than it may.", now_s)
    effects += [SendAbort(revision), Note("revision.failed", revision, resident.failure)]
    return resident


def _let_go(member: Member, revision: str, effects: list[Effect]) -> Member:
    """Lets a member get rid of a revision that it shall not hold.

    A worker is not told yet: requests may run on it, which the store knows; `RetireAsked` follows.
    """
    resident = member.residents[revision]
    if resident.phase in _UNDER_WAY and member.kind is Kind.WORKER:
        effects += [SendAbort(revision), Note("revision.aborted", revision)]
        return _with(member, revision, resident.after(Turn.ABORT))
    if resident.phase is Phase.FAILED:
        # A later rollout begins with a clean slate.
        return _with(member, revision, Resident())
    if resident.phase in _HELD and member.kind is Kind.GATEWAY:
        return _retire(member, revision, effects)
    return member


def _retire(member: Member, revision: str, effects: list[Effect]) -> Member:
    resident = member.residents.get(revision, Resident())
    if resident.phase not in _HELD:
        return member
    effects += [SendRetire(revision), Note("revision.retiring", revision)]
    return _with(member, revision, resident.after(Turn.RETIRE))


# What is there of a revision that was asked for its files alone. One that is being loaded is no such.
_STAGEABLE = frozenset({Phase.STAGING, Phase.STAGED, Phase.FAILED})

_UNDER_WAY = frozenset({Phase.STAGING, Phase.STAGED, Phase.PREPARING})

_HELD = frozenset({Phase.READY, Phase.ACTIVATING, Phase.ACTIVE})


def is_given_up(resident: Resident) -> bool:
    """Whether a revision failed as often as it is tried: nobody asks for it again by himself."""
    return resident.phase is Phase.FAILED and resident.attempts > len(RETRY_AFTER_S)


def _is_due_again(resident: Resident, now_s: float) -> bool:
    return resident.phase is Phase.FAILED and resident.due_s <= now_s and not is_given_up(resident)


def _with(member: Member, revision: str, resident: Resident) -> Member:
    others = {name: other for name, other in member.residents.items() if name != revision}
    if resident.phase is Phase.ABSENT:
        return replace(member, residents=others)
    return replace(member, residents={**others, revision: resident})


def _listing_effects(before: Member, after: Member) -> tuple[Effect, ...]:
    """The difference between what gateways read and what they shall read."""
    # An earlier controller may have left a record of a worker that is new to us.
    inherited = before.presence is Presence.UNKNOWN and after.kind is Kind.WORKER
    if after.listing == before.listing and not inherited:
        return ()
    return (RemoveWorker(after.id),) if after.listing is None else (WriteWorker(after.id),)
