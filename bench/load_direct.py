"""The same clients without a queue: straight at a worker's session, all at once.

Owns: one session, and who waits for which job in it. A request that the worker has no room for is refused,
and its client tries again at once, for nothing tells it when to come back.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from interlock.v1 import generation_pb2, worker_service_pb2_grpc
from interlock.v1 import worker_service_pb2 as pb

from bench.load_plan import Ask
from bench.load_trace import Fate, Trace
from services.common.channel import connect
from services.common.credential import mesh_metadata

_ENDS = {
    generation_pb2.FINISH_REASON_STOP: Fate.FINISHED,
    generation_pb2.FINISH_REASON_LENGTH: Fate.FINISHED,
}


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker serves.

    Attributes:
        model: The model's name.
        revision: The revision that is active.
        epoch: The highest epoch that the worker has seen.
    """

    model: str
    revision: str
    epoch: int


@dataclass(slots=True)
class _Job:
    trace: Trace
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class DirectCaller:
    """Asks over a session that is open; see `open_direct`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._numbers = itertools.count(1)
        self._jobs: dict[str, _Job] = {}
        # Each client has at most one order under way, so that this is as long as there are clients.
        self._orders: asyncio.Queue[pb.StartJob] = asyncio.Queue()

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        name = str(next(self._numbers))
        job = self._jobs[name] = _Job(trace)
        self._orders.put_nowait(
            pb.StartJob(
                job=name, attempt=1, model=self._work.model, revision=self._work.revision,
                epoch=self._work.epoch, prompt_ids=ask.prompt_ids, max_tokens=ask.answer_tokens, n=1,
                credit_tokens=ask.answer_tokens,
            )
        )  # fmt: skip
        try:
            await job.ended.wait()
        finally:
            # A client that was cut waits for nothing more, however the session ends.
            self._jobs.pop(name, None)

    async def orders(self) -> AsyncIterator[pb.SessionRequest]:
        """What the session sends."""
        while True:
            yield pb.SessionRequest(start=await self._orders.get())

    async def read(self, responses: AsyncIterable[pb.SessionResponse]) -> None:
        """Tells each client what concerns it, until the session ends."""
        try:
            async for response in responses:
                now_s = time.monotonic()
                match response.WhichOneof("event"):
                    case "refused":
                        self._refused(response.refused, now_s)
                    case "step":
                        for output in response.step.outputs:
                            self._put_out(output, now_s)
        finally:
            for name in tuple(self._jobs):
                self._end(name, time.monotonic(), Fate.FAILED)

    def _refused(self, refused: pb.Refused, now_s: float) -> None:
        busy = refused.reason == pb.REFUSAL_REASON_BUSY
        self._end(refused.job, now_s, Fate.REFUSED if busy else Fate.FAILED)

    def _put_out(self, output: pb.StepOutput, now_s: float) -> None:
        job = self._jobs.get(output.job)
        if job is None:
            return
        job.trace.started_s = job.trace.started_s or now_s
        if output.token_ids:
            job.trace.arrivals.append((now_s, len(output.token_ids)))
        if output.finish:
            self._end(output.job, now_s, _ENDS.get(output.finish, Fate.FAILED))

    def _end(self, name: str, now_s: float, fate: Fate) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            job.trace.end(now_s, fate)
            job.ended.set()


@asynccontextmanager
async def open_direct(address: str, mesh_token: str, model: str) -> AsyncIterator[DirectCaller]:
    """A session with the worker at `address`; its end cancels everything in it."""
    metadata = mesh_metadata(mesh_token, **{"x-interlock-gateway-id": "bench"})
    async with connect(address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        state = await stub.GetState(pb.GetStateRequest(), metadata=metadata)
        caller = DirectCaller(work_of(state, model))
        call = stub.Session(caller.orders(), metadata=metadata)
        reading = asyncio.create_task(caller.read(call))
        try:
            yield caller
        finally:
            call.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def work_of(state: pb.GetStateResponse, model: str) -> Work:
    """What a worker says that it serves."""
    revision = next((one.revision for one in state.revisions), "")
    return Work(model, revision, state.epoch)
