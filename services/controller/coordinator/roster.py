"""The roster: the members of one model, and their streams. Owns: that each effect on a member is performed.

Must not know: the route, rollouts, or what a member shall hold; that is told with every event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from services.common import logs
from services.common.clock import Clock
from services.common.errors import WorkerUnknown
from services.controller.coordinator.worker_records import MemberKey
from services.controller.core import membership
from services.controller.core.commands import Effect, EndStream, Note, RemoveWorker, SendProve, WriteWorker
from services.controller.core.member import Event, Goal, Hello, Kind, Member, Presence, Silence, Tick
from services.controller.core.membership import Rules
from services.controller.core.ports import MemberStream
from services.controller.core.residency import Phase

# When this much time passed between two ticks, we slept (a stopped process, a suspended machine), and the
# silence of the members proves nothing.
SLEPT_S = 3.0
# A worker that is gone stays visible to operators for a while.
LOST_KEPT_S = 600.0
# Far more than one controller is meant for; beyond it, something attaches under ever new names.
MEMBERS_MAX = 10_000

_UNLOADABLE = frozenset({Phase.READY, Phase.ACTIVATING, Phase.ACTIVE})


class Roster:
    """Who is there.

    Args:
        model: The model, for the log.
        clock: The time.
        mark: Is told of workers whose record has changed.
    """

    def __init__(self, model: str, clock: Clock, mark: Callable[[str], None]) -> None:
        self._model = model
        self._clock = clock
        self._mark = mark
        self._members: dict[MemberKey, Member] = {}
        self._streams: dict[MemberKey, MemberStream] = {}
        self._ticked_s = clock.monotonic()

    @property
    def members(self) -> Mapping[MemberKey, Member]:
        """Every member; those that were lost lately included."""
        return self._members

    @property
    def attached(self) -> tuple[MemberKey, ...]:
        """Those that have a stream."""
        return tuple(self._streams)

    def has_stream(self, key: MemberKey) -> bool:
        """Whether a member can be told something now."""
        return key in self._streams

    def of(self, kind: Kind) -> tuple[Member, ...]:
        """The members of a kind, by id; also for other threads."""
        members = self._members.copy()
        return tuple(members[key] for key in sorted(members) if key.kind is kind)

    def worker_key(self, worker_id: str) -> MemberKey:
        """How a worker is known that is here, or was a moment ago.

        Raises:
            WorkerUnknown: No such worker is here.
        """
        key = MemberKey(Kind.WORKER, worker_id)
        member = self._members.get(key)
        if member is None or member.presence is Presence.LOST:
            raise WorkerUnknown(f"No worker {worker_id!a} is attached.")
        return key

    def has_room(self, key: MemberKey) -> bool:
        """Whether a member may come in."""
        return key in self._members or len(self._members) < MEMBERS_MAX

    def take_in(self, hello: Hello, stream: MemberStream) -> MemberKey:
        """Gives a member its stream; an earlier one of the same member ends."""
        key = MemberKey(hello.kind, hello.id)
        earlier = self._streams.pop(key, None)
        if earlier is not None:
            earlier.end("The same member attached again.")
        self._streams[key] = stream
        self._members.setdefault(key, Member(hello.kind, hello.id))
        return key

    def is_current(self, key: MemberKey, stream: MemberStream) -> bool:
        """Whether a member speaks by this stream, and not by a later one."""
        return self._streams.get(key) is stream

    def drop_stream(self, key: MemberKey) -> None:
        """Forgets a stream that has ended."""
        del self._streams[key]

    def end_all(self, reason: str) -> None:
        """Ends every stream."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(reason)

    def advance(self, key: MemberKey, event: Event, goal: Goal | None, rules: Rules) -> tuple[Effect, ...]:
        """Lets a member take an event in; returns what followed, which has been performed."""
        taken = membership.step(self._members[key], event, goal, self._clock.monotonic(), rules)
        self._members[key] = taken.member
        for effect in taken.effects:
            self._perform(key, effect)
        return taken.effects

    def tick(self, lease_ttl_s: float, *, judging: bool = True) -> Iterator[tuple[MemberKey, Event]]:
        """What each member's lease says now: the caller lets the member take it in, one after the other.

        Args:
            lease_ttl_s: How long a member may be silent.
            judging: False: silence proves nothing now, and every lease begins anew.
        """
        now_s = self._clock.monotonic()
        slept = now_s - self._ticked_s > SLEPT_S or not judging
        self._ticked_s = now_s
        for key, member in list(self._members.items()):
            if slept:
                lease_end_s = max(member.lease_end_s, now_s + lease_ttl_s)
                self._members[key] = replace(member, lease_end_s=lease_end_s)
                yield key, Tick()
            elif member.presence is Presence.LOST:
                if member.lease_end_s + LOST_KEPT_S < now_s:
                    del self._members[key]
            else:
                yield key, Silence() if member.lease_end_s <= now_s else Tick()

    def prove(self, revision: str) -> None:
        """Lets each worker in which a revision serves ask it its golden prompts."""
        for key, stream in self._streams.items():
            if key.kind is Kind.WORKER and revision in self._members[key].active_revisions:
                stream.send(SendProve(revision))

    def unneeded(self, goal: Callable[[Member], Goal | None]) -> Iterator[tuple[MemberKey, str]]:
        """Revisions inside attached workers that their goals do not name."""
        for key, member in self._members.items():
            wanted = goal(member)
            if key.kind is not Kind.WORKER or wanted is None or not self.has_stream(key) or member.draining:
                continue
            for revision, resident in member.residents.items():
                if revision not in wanted.holds and resident.phase in _UNLOADABLE:
                    yield key, revision

    def _perform(self, key: MemberKey, effect: Effect) -> None:
        stream = self._streams.get(key)
        match effect:
            case Note(event, revision, reason):
                self._log(key, event, revision, reason)
            case WriteWorker(worker_id) | RemoveWorker(worker_id):
                self._mark(worker_id)
            case EndStream(reason):
                if stream is not None:
                    del self._streams[key]
                    stream.end(reason)
            case _:
                if stream is not None:
                    stream.send(effect)

    def _log(self, key: MemberKey, event: str, revision: str, reason: str) -> None:
        fields = {f"{key.kind}_id": key.id, "model": self._model}
        if revision:
            fields["revision"] = revision
        if reason:
            fields["reason"] = reason
        emit = logs.get_logger().warning if reason else logs.get_logger().info
        emit(event, **fields)
