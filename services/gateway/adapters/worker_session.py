"""A session with a worker. Owns: the stream that carries every attempt at it, and who hears what comes out.

Must not know: queues, text or clients. A message, at most one a step, is for all attempts together. A session
that ends, or falls silent, is lost for every attempt on it at once. What a worker says of an attempt that is
over is dropped here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from interlock.v1 import generation_pb2, worker_service_pb2, worker_service_pb2_grpc

from services.common import channel, logs
from services.common.clock import Clock
from services.gateway.adapters.worker_line import WorkerLine
from services.gateway.adapters.worker_messages import read_output, start_job
from services.gateway.core.attempts import Loss, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import FinishReason
from services.gateway.core.pace import Pace
from services.gateway.core.ports import Attempt, AttemptSink
from services.gateway.core.vital_signs import VitalSigns

# Looking this often finds a silence at most a tenth late.
WATCH_S = 0.2
# Both processes run on one network; a connection takes milliseconds, or is refused.
CONNECT_LIMIT_S = 2.0
# Two steps of a busy worker on a small machine; a slot is never held longer for a polite goodbye.
CANCEL_WAIT_S = 0.08

Key = tuple[str, int]

_FINISHES = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_REFUSALS = {
    worker_service_pb2.REFUSAL_REASON_BUSY: RefusalReason.BUSY,
    worker_service_pb2.REFUSAL_REASON_REVISION_NOT_READY: RefusalReason.REVISION_NOT_READY,
    worker_service_pb2.REFUSAL_REASON_EPOCH_STALE: RefusalReason.EPOCH_STALE,
    worker_service_pb2.REFUSAL_REASON_DRAINING: RefusalReason.DRAINING,
    worker_service_pb2.REFUSAL_REASON_INVALID: RefusalReason.INVALID,
}


@dataclass(slots=True)
class _Carried:
    """An attempt under way: who hears of it, and its sequences that have not ended."""

    sink: AttemptSink
    open: set[int]


@dataclass(frozen=True, slots=True)
class _Ending:
    """A cancelled attempt: what is done when the worker has ended it, and its sequences that it has not."""

    ended: asyncio.Future[None]
    open: set[int]


@dataclass(slots=True, eq=False)
class WorkerSession:
    """One stream to one worker, with everything that runs on it.

    Attributes:
        worker_id: The worker.
        address: Where it listens.
        metadata: How the gateway introduces itself.
        clock: Measures silence.
        signs: Judges it.
        pace: How long the worker is to hold tokens back.
        on_end: Is called once it is over, with the cause.
        on_pace: Is called where workers are to hold tokens back longer, or less long.
    """

    worker_id: str
    address: str
    metadata: tuple[tuple[str, str], ...]
    clock: Clock
    signs: VitalSigns
    pace: Pace
    on_end: Callable[[WorkerSession, str], None]
    on_pace: Callable[[], None]
    _carried: dict[Key, _Carried] = field(default_factory=dict)
    # Attempts that were cancelled and not yet confirmed; bounded by the time that each may stay.
    _ending: dict[Key, _Ending] = field(default_factory=dict)
    # Bounded by the requests under way: each has one order, its cancellations and its credit.
    _line: WorkerLine = field(default_factory=WorkerLine)
    _task: asyncio.Task[None] | None = None
    # Set when nothing can be sent any more; `_ended_itself` when no one has to cancel the task for it.
    _over: bool = False
    # What its end is for every attempt on it.
    _loss: Loss = Loss.SILENCE
    _ended_itself: bool = False
    # Sequences that wait for credit, as the worker last said.
    _paused: int = 0
    # Those that generate, as the pace counts them.
    _counted: int = 0
    # What the worker was asked for last.
    _hold_ms: int = 0

    def start(self, order: WorkOrder, sink: AttemptSink) -> Attempt:
        """Sends an order, opening the stream with the first."""
        key = (order.job_id, order.attempt)
        if not self._carried:
            self.signs.reset(self.clock.monotonic())
        self._carried[key] = _Carried(sink, set(order.open))
        self._count()
        self.keep_pace()
        self._line.put(worker_service_pb2.SessionRequest(start=start_job(order)))
        if self._task is None:
            # The session outlives the request that opens it, so it must not bear that request's log fields.
            context = logs.process_context()
            self._task = asyncio.get_running_loop().create_task(self._run(), context=context)
        return _SessionAttempt(self, key)

    def keep_pace(self) -> None:
        """Sends how long the worker is to hold tokens back, where it has something to generate."""
        if self._carried and self._hold_ms != self.pace.hold_ms:
            self._hold_ms = self.pace.hold_ms
            coalesce = worker_service_pb2.Coalesce(hold_ms=self._hold_ms)
            self._line.put(worker_service_pb2.SessionRequest(coalesce=coalesce))

    def add_credit(self, key: Key, sequence: int, tokens: int) -> None:
        """Sends credit for a sequence of an attempt that is under way."""
        if key in self._carried:
            credit = worker_service_pb2.AddCredit(job=key[0], sequence=sequence, tokens=tokens)
            self._line.put(worker_service_pb2.SessionRequest(credit=credit))

    def end(self, key: Key, sequence: int) -> None:
        """Sends that a sequence is long enough; what the worker still says of it goes no further."""
        carried = self._carried.get(key)
        if carried is not None and sequence in carried.open:
            carried.open.discard(sequence)
            cancel = worker_service_pb2.CancelJob(job=key[0], sequence=sequence)
            self._line.put(worker_service_pb2.SessionRequest(cancel=cancel))

    def cancel(self, key: Key) -> asyncio.Future[None]:
        """Sends a cancellation; the future is done when the worker has ended the attempt."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        carried = self._carried.pop(key, None)
        if carried is None or self._over:
            ended.set_result(None)
            return ended
        self._ending[key] = _Ending(ended, carried.open)
        loop.call_later(CANCEL_WAIT_S, self._ended, key)
        self._line.put(worker_service_pb2.SessionRequest(cancel=worker_service_pb2.CancelJob(job=key[0])))
        return ended

    def lose(self, cause: str) -> None:
        """Tells every attempt that the worker is gone, or that its order has never reached it."""
        self._over = True
        carried = tuple(self._carried.items())
        self._carried.clear()
        self._count()
        for key in tuple(self._ending):
            self._ended(key)
        # None of these can be to blame for the loss.
        unsent = {(start.job, start.attempt) for start in self._line.starts()}
        for key, one in carried:
            if key in unsent:
                one.sink.refused(RefusalReason.UNREACHABLE, cause)
            else:
                one.sink.lost(cause, self._loss)

    async def close(self) -> None:
        """Ends the stream."""
        if self._task is not None:
            if not self._ended_itself:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        connection, cause = channel.connect(self.address, light=True), "its session was cancelled"
        try:
            cause = await self._converse(connection)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else "closed"
            cause = f"its session failed: {code}"
            self._note_broken()
        except Exception:  # noqa: BLE001 - a defect here must reach the attempts as a loss, not as silence
            logs.get_logger().error("session.crashed", worker_id=self.worker_id, exc_info=True)
            cause = "the gateway could not read its session"
        else:
            logs.get_logger().info("session.ended", worker_id=self.worker_id, cause=cause)
        finally:
            self._ended_itself = not self._over
            if self._ended_itself:
                # Before anything is awaited, so that no new order comes onto a session that is over.
                self.on_end(self, cause)
            await connection.close()

    async def _converse(self, connection: grpc.aio.Channel) -> str:
        """Speaks until one side has enough; returns why."""
        if not await _connects(connection):
            return "it cannot be reached"
        self.signs.reset(self.clock.monotonic())
        stub = worker_service_pb2_grpc.WorkerServiceStub(connection)
        call = stub.Session(metadata=self.metadata)
        reader = asyncio.ensure_future(self._read(call))
        writer = asyncio.ensure_future(self._line.write_to(call))
        watch = asyncio.ensure_future(self._watch())
        try:
            first = await _first_done(reader, writer, watch)
        finally:
            call.cancel()
        if first is watch:
            return watch.result()
        self._note_broken()
        return "its session ended"

    def _note_broken(self) -> None:
        """The stream broke: with the worker's process, or because this one was away for too long."""
        absent = self.signs.was_absent(self.clock.monotonic())
        self._loss = Loss.ABSENCE if absent else Loss.PROCESS

    async def _read(self, call: Any) -> None:
        async for response in call:
            match response.WhichOneof("event"):
                case "step":
                    self.signs.hear(self.clock.monotonic())
                    for output in response.step.outputs:
                        self._deliver(output)
                case "refused":
                    self.signs.hear(self.clock.monotonic())
                    self._refuse(response.refused)
                case "alive":
                    alive = response.alive
                    self._paused = alive.paused_jobs
                    self._line.commands_max = alive.commands_max
                    can_step = self._open_sequences() > self._paused
                    self.signs.hear_alive(alive.step, can_step=can_step, now_s=self.clock.monotonic())

    async def _watch(self) -> str:
        """Returns when the worker is silent or stands still although it has work, and says which."""
        while True:
            now_s = self.clock.monotonic()
            self.signs.look(now_s)
            self._count()
            if self._carried and (ailment := self.signs.ailment(now_s)) is not None:
                return ailment
            await asyncio.sleep(WATCH_S)

    def _deliver(self, output: worker_service_pb2.StepOutput) -> None:
        key = (output.job, output.attempt)
        carried = self._carried.get(key)
        ends = output.finish != generation_pb2.FINISH_REASON_UNSPECIFIED
        if carried is None:
            if ends:
                self._wind_down(key, output.sequence)
            return
        if output.sequence not in carried.open:
            return
        if not ends:
            carried.sink.output(read_output(output, None))
            return
        reason = _FINISHES.get(output.finish)
        if reason is None:
            self._give_up(key, carried, output)
            return
        carried.open.discard(output.sequence)
        if not carried.open:
            del self._carried[key]
        carried.sink.output(read_output(output, reason, others=len(carried.open)))

    def _give_up(self, key: Key, carried: _Carried, output: worker_service_pb2.StepOutput) -> None:
        """The worker cannot go on with a sequence, and so not with the attempt: its others end with it."""
        if output.token_ids:
            carried.sink.output(read_output(output, None))
        if key not in self._carried or output.sequence not in carried.open:
            # Its last tokens completed a stop string, so that it had ended well.
            return
        if output.flaw:
            self._give_back(key, carried, output)
            return
        del self._carried[key]
        if len(carried.open) > 1:
            self._line.put(worker_service_pb2.SessionRequest(cancel=worker_service_pb2.CancelJob(job=key[0])))
        carried.sink.lost("it ended the sequence without finishing it", Loss.JOB)

    def _give_back(self, key: Key, carried: _Carried, output: worker_service_pb2.StepOutput) -> None:
        """The job itself is to blame, which is told once the worker has ended its other sequences.

        For its slots are given away then, and a worker that still holds them would refuse the next job.
        """
        carried.open.discard(output.sequence)
        if not carried.open:
            del self._carried[key]
            carried.sink.refused(RefusalReason.INVALID, output.flaw)
            return
        flaw = output.flaw
        self.cancel(key).add_done_callback(lambda _: carried.sink.refused(RefusalReason.INVALID, flaw))

    def _open_sequences(self) -> int:
        return sum(len(carried.open) for carried in self._carried.values())

    def _count(self) -> None:
        """Tells the pace how many sequences generate here: as one starts, and every now and then."""
        counted, self._counted = self._counted, max(0, self._open_sequences() - self._paused)
        if self.pace.follow(self._counted - counted):
            self.on_pace()

    def _refuse(self, refused: worker_service_pb2.Refused) -> None:
        carried = self._carried.pop((refused.job, refused.attempt), None)
        self._ended((refused.job, refused.attempt))
        if carried is not None:
            carried.sink.refused(_REFUSALS.get(refused.reason, RefusalReason.BUSY), refused.message)

    def _wind_down(self, key: Key, sequence: int) -> None:
        ending = self._ending.get(key)
        if ending is not None:
            ending.open.discard(sequence)
            if not ending.open:
                self._ended(key)

    def _ended(self, key: Key) -> None:
        ending = self._ending.pop(key, None)
        if ending is not None and not ending.ended.done():
            ending.ended.set_result(None)


@dataclass(frozen=True, slots=True)
class _SessionAttempt:
    """One attempt on a session."""

    session: WorkerSession
    key: Key

    def add_credit(self, sequence: int, tokens: int) -> None:
        """See `Attempt.add_credit`."""
        self.session.add_credit(self.key, sequence, tokens)

    def end(self, sequence: int) -> None:
        """See `Attempt.end`."""
        self.session.end(self.key, sequence)

    def cancel(self, verdict: Verdict = Verdict.NEUTRAL) -> asyncio.Future[None]:  # noqa: ARG002 - nobody is judged here
        """See `Attempt.cancel`."""
        return self.session.cancel(self.key)


async def _connects(connection: grpc.aio.Channel) -> bool:
    """Whether the channel is ready in time; a refused connection is not tried again."""
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            state = connection.get_state(try_to_connect=True)
            while state not in {grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE}:
                await connection.wait_for_state_change(state)
                state = connection.get_state()
    except TimeoutError:
        return False
    return state is grpc.ChannelConnectivity.READY


async def _first_done(*tasks: asyncio.Future[Any]) -> asyncio.Future[Any]:
    """Waits for the first task, cancels the others, raises what it raised, and returns it."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # The reader knows best why a session ended: it is looked at first.
    first = next(task for task in tasks if task in done)
    first.result()
    return first
