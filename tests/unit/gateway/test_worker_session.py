"""A session with a worker that ends: which attempts were lost with it, and which had never reached it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from interlock.v1 import generation_pb2
from interlock.v1 import worker_service_pb2 as pb

from services.common.clock import Clock
from services.common.system_clock import SystemClock
from services.gateway.adapters.worker_session import WATCH_S, WorkerSession
from services.gateway.core.attempts import Loss, Output, RefusalReason
from services.gateway.core.pace import Pace
from services.gateway.core.vital_signs import VitalSigns
from tests.fakes.gateway_ports import work_order
from tests.fakes.turned_clock import TurnedClock


@dataclass
class Stream:
    """A stream whose other end the test plays; it takes so many messages, and the next one waits."""

    room: int
    commands_max: int
    written: list[pb.SessionRequest] = field(default_factory=list)
    took: asyncio.Event = field(default_factory=asyncio.Event)
    waits: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: pb.SessionRequest = field(default_factory=pb.SessionRequest)
    broken: asyncio.Event = field(default_factory=asyncio.Event)

    async def write(self, request: pb.SessionRequest) -> None:
        """Takes a message, or lets it wait for a reader that never comes."""
        if self.broken.is_set():
            raise asyncio.InvalidStateError("RPC already finished.")
        if len(self.written) >= self.room:
            self.waiting = request
            self.waits.set()
            await asyncio.Event().wait()
        self.written.append(request)
        self.took.set()

    async def __aiter__(self) -> AsyncIterator[pb.SessionResponse]:
        """A sign of life, and nothing more until it breaks."""
        yield pb.SessionResponse(alive=pb.Alive(commands_max=self.commands_max))
        await self.broken.wait()

    def cancel(self) -> None:
        """There is nobody to tell."""


@dataclass
class Connection:
    """A channel that is ready, or never becomes so."""

    ready: bool = True

    def get_state(self, *, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See `grpc.aio.Channel.get_state`."""
        del try_to_connect
        states = grpc.ChannelConnectivity
        return states.READY if self.ready else states.TRANSIENT_FAILURE

    async def close(self) -> None:
        """Nothing is open."""


class Sink:
    """Remembers how its attempt ended."""

    def __init__(self) -> None:
        self.ends: list[RefusalReason | Loss] = []
        self.heard: Callable[[Output], None] | None = None

    def output(self, output: Output) -> None:
        """Nobody speaks here, unless a test listens."""
        assert self.heard is not None, output
        self.heard(output)

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        assert message
        self.ends.append(reason)

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        assert cause
        self.ends.append(loss)


class World:
    """A session over a stream that the test plays, with an attempt for each name."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        room: int,
        *,
        ready: bool = True,
        commands_max: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.stream, self.ended = Stream(room, commands_max), asyncio.Event()
        self.sinks: dict[str, Sink] = {}
        patch.setattr("services.common.channel.connect", lambda *_, **__: Connection(ready))
        patch.setattr("interlock.v1.worker_service_pb2_grpc.WorkerServiceStub", lambda _: self)
        signs, clock = VitalSigns(3.0, 10.0), clock or SystemClock()
        self.session = WorkerSession("w1", "127.0.0.1:1", (), clock, signs, Pace(0), self._end, lambda: None)

    def Session(self, metadata: Any) -> Stream:
        """The stub's method."""
        del metadata
        return self.stream

    def start(self, name: str, sequences: int = 1) -> None:
        """Begins an attempt."""
        self.sinks[name] = Sink()
        order = replace(work_order(name), emitted=((),) * sequences)
        self.session.start(order, self.sinks[name])

    def end(
        self, name: str, sequence: int, finish: generation_pb2.FinishReason.ValueType, flaw: str = ""
    ) -> None:
        """The worker tells the end of a sequence."""
        self.session._deliver(pb.StepOutput(job=name, attempt=1, sequence=sequence, finish=finish, flaw=flaw))

    async def wait_ended(self) -> dict[str, list[RefusalReason | Loss]]:
        """How each attempt ended."""
        await asyncio.wait_for(self.ended.wait(), 5)
        await self.session.close()
        return {name: sink.ends for name, sink in self.sinks.items()}

    def _end(self, session: WorkerSession, cause: str) -> None:
        session.lose(cause)
        self.ended.set()


async def test_an_order_that_waits_for_the_wire_is_not_lost_with_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot have killed it: it is as if the worker had not been reached, for the next in line too."""
    world = World(monkeypatch, room=1)
    for name in "abc":
        world.start(name)
    await world.stream.took.wait()
    world.stream.broken.set()
    assert await world.wait_ended() == {
        "a": [Loss.PROCESS],
        "b": [RefusalReason.UNREACHABLE],
        "c": [RefusalReason.UNREACHABLE],
    }


async def test_orders_that_travel_together_are_not_lost_before_they_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While their message is being written, each of them still waits for the wire."""
    world = World(monkeypatch, room=1, commands_max=8)
    world.start("a")
    await world.stream.took.wait()
    for name in "bc":
        world.start(name)
    await asyncio.wait_for(world.stream.waits.wait(), 5)
    assert [one.start.job for one in world.stream.waiting.commands.requests] == ["b", "c"]
    world.start("d")
    world.stream.broken.set()
    unsent = [RefusalReason.UNREACHABLE]
    assert await world.wait_ended() == {"a": [Loss.PROCESS], "b": unsent, "c": unsent, "d": unsent}


async def test_an_order_for_a_stream_that_has_ended_is_not_lost_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writer finds out before the reader does."""
    world = World(monkeypatch, room=9)
    world.start("a")
    await world.stream.took.wait()
    world.stream.broken.set()
    world.start("b")
    assert await world.wait_ended() == {"a": [Loss.PROCESS], "b": [RefusalReason.UNREACHABLE]}


@pytest.mark.parametrize(
    ("away_s", "looks", "loss"),
    [
        (10.0, False, Loss.ABSENCE),
        (10.0, True, Loss.ABSENCE),
        (2.9, False, Loss.PROCESS),
        (2.9, True, Loss.PROCESS),
    ],
    ids=["broken at once", "looks first", "a short stall", "looks after a short stall"],
)
async def test_a_stream_that_breaks_as_this_process_wakes_was_lost_by_it(
    monkeypatch: pytest.MonkeyPatch,
    away_s: float,
    looks: bool,  # noqa: FBT001 - parametrized
    loss: Loss,
) -> None:
    """The worker has let go of a gateway that stood still, which says nothing of the worker."""
    clock = TurnedClock()
    world = World(monkeypatch, room=1, clock=clock)
    world.start("a")
    await world.stream.took.wait()
    clock.turn(away_s)
    if looks:
        await asyncio.sleep(1.5 * WATCH_S)
        assert not world.ended.is_set()
    world.stream.broken.set()
    assert await world.wait_ended() == {"a": [loss]}


async def test_a_worker_that_cannot_be_reached_has_lost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No order has left the process."""
    world = World(monkeypatch, room=9, ready=False)
    world.start("a")
    assert await world.wait_ended() == {"a": [RefusalReason.UNREACHABLE]}


async def test_a_job_that_is_to_blame_ends_once_the_worker_has_ended_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its slots are lent again then: the next job would be refused by a worker that still holds them."""
    world = World(monkeypatch, room=9)
    world.start("a", 3)
    world.end("a", 1, generation_pb2.FINISH_REASON_ERROR, "format: why")
    world.end("a", 0, generation_pb2.FINISH_REASON_CANCELLED)
    await asyncio.sleep(0)
    assert world.sinks["a"].ends == []
    world.end("a", 2, generation_pb2.FINISH_REASON_CANCELLED)
    await asyncio.sleep(0)
    assert world.sinks["a"].ends == [RefusalReason.INVALID]
    sent = [*world.stream.written, *world.session._line._waiting]
    assert [one.cancel.job for one in sent if one.HasField("cancel")] == ["a"]
    await world.session.close()


@pytest.mark.parametrize(("flaw", "end"), [("format: why", RefusalReason.INVALID), ("", Loss.JOB)])
async def test_an_error_is_the_jobs_where_the_worker_says_so(
    monkeypatch: pytest.MonkeyPatch, flaw: str, end: RefusalReason | Loss
) -> None:
    """Without a word it is the worker's, as it is for workers that have none."""
    world = World(monkeypatch, room=9)
    world.start("a")
    world.end("a", 0, generation_pb2.FINISH_REASON_ERROR, flaw)
    assert world.sinks["a"].ends == [end]
    await world.session.close()


@pytest.mark.parametrize("flaw", ["format: why", ""])
async def test_a_sequence_that_was_long_enough_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, flaw: str
) -> None:
    """Its last tokens, which come with the error, completed a stop string; the other one goes on."""
    world = World(monkeypatch, room=9)
    world.start("a", 2)
    heard: list[Output] = []

    def hear(output: Output) -> None:
        heard.append(output)
        if output.sequence == 0:
            world.session.end(("a", 1), 0)

    world.sinks["a"].heard = hear
    failed = generation_pb2.FINISH_REASON_ERROR
    world.session._deliver(
        pb.StepOutput(job="a", attempt=1, sequence=0, token_ids=[1], finish=failed, flaw=flaw)
    )
    world.session._deliver(pb.StepOutput(job="a", attempt=1, sequence=1, token_ids=[2]))
    assert [(one.sequence, one.token_ids) for one in heard] == [(0, (1,)), (1, (2,))]
    assert world.sinks["a"].ends == []
    await world.session.close()
