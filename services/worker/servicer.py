"""The servicer. Owns: the translation between `interlock.v1.WorkerService` and the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from interlock.v1 import worker_service_pb2, worker_service_pb2_grpc

from services.common import logs
from services.common.clock import Clock
from services.common.credential import GATEWAY_ID_KEY
from services.common.errors import ArgumentInvalid
from services.common.grpc_types import Context
from services.common.ids import is_valid_id
from services.worker.adapters.job_messages import key_of, read_job, refused, step_output, unserved
from services.worker.adapters.worker_messages import resident_revisions, worker_load
from services.worker.core.admission import Reason, Refusal
from services.worker.core.outbox import Letter
from services.worker.core.revision import Residency
from services.worker.engine import Engine, EngineSession

SERVICE = "interlock.v1.WorkerService"

# A gateway misses two of these before it gives a worker up.
ALIVE_INTERVAL_S = 1.0

# Requests in one message; while they are taken in, nobody else has the event loop: some milliseconds.
COMMANDS_MAX = 64


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """Serves gateways.

    Args:
        worker_id: The worker's name.
        incarnation: Names this process.
        engine: Where jobs run.
        residency: What is resident.
        clock: For the signs of life.
    """

    def __init__(
        self, worker_id: str, incarnation: str, engine: Engine, residency: Residency, clock: Clock
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._engine = engine
        self._residency = residency
        self._clock = clock

    async def Session(
        self, request_iterator: AsyncIterator[worker_service_pb2.SessionRequest], context: Context
    ) -> AsyncIterator[worker_service_pb2.SessionResponse]:
        """Carries all jobs of one gateway; when it ends, for whatever reason, they are cancelled."""
        logs.annotate(gateway_id=_gateway_id(context))
        session = self._engine.open_session()
        reader = asyncio.create_task(_read(request_iterator, session), name="session-reader")
        try:
            async for response in self._responses(session):
                yield response
            if reader.done():
                # What ended the reading ends the call: nothing, or the engine's refusal to go on.
                reader.result()
        finally:
            session.close()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def GetState(
        self,
        request: worker_service_pb2.GetStateRequest,  # noqa: ARG002 - it has no fields
        context: Context,  # noqa: ARG002 - the generated signature
    ) -> worker_service_pb2.GetStateResponse:
        """What the worker holds and carries."""
        return worker_service_pb2.GetStateResponse(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            revisions=resident_revisions(self._residency),
            load=worker_load(self._engine.pulse, self._engine.slots),
            epoch=self._residency.epoch,
        )

    async def _responses(self, session: EngineSession) -> AsyncIterator[worker_service_pb2.SessionResponse]:
        alive_at_s = self._clock.monotonic()
        while True:
            wait_s = max(0.0, alive_at_s - self._clock.monotonic())
            try:
                async with asyncio.timeout(wait_s):
                    letter = await session.receive()
            except TimeoutError:
                letter = Letter((), ())
            if letter is None:
                return
            for response in _messages(letter, self._engine, self._residency):
                yield response
            if self._clock.monotonic() >= alive_at_s:
                yield self._alive(session)
                alive_at_s = self._clock.monotonic() + ALIVE_INTERVAL_S

    def _alive(self, session: EngineSession) -> worker_service_pb2.SessionResponse:
        pulse = self._engine.pulse
        alive = worker_service_pb2.Alive(
            step=pulse.steps,
            free_slots=pulse.free_slots,
            paused_jobs=session.paused_jobs,
            commands_max=COMMANDS_MAX,
        )
        return worker_service_pb2.SessionResponse(alive=alive)


async def _read(requests: AsyncIterator[worker_service_pb2.SessionRequest], session: EngineSession) -> None:
    try:
        async for request in requests:
            if request.HasField("commands"):
                _dispatch_all(request.commands.requests, session)
            else:
                _dispatch(request, session)
    finally:
        session.close()


def _dispatch_all(requests: Sequence[worker_service_pb2.SessionRequest], session: EngineSession) -> None:
    if len(requests) > COMMANDS_MAX:
        # Orders that are merely dropped would be waited for; and no gateway sends so many that is not broken.
        raise ArgumentInvalid(f"commands: {len(requests)} requests are too many, {COMMANDS_MAX} are taken.")
    for request in requests:
        _dispatch(request, session)


def _dispatch(request: worker_service_pb2.SessionRequest, session: EngineSession) -> None:
    match request.WhichOneof("command"):
        case "start":
            flaw = unserved(request.start)
            if flaw is None:
                session.start(read_job(request.start, session.number))
            else:
                session.refuse(Refusal(key_of(request.start, session.number), Reason.INVALID, flaw))
        case "credit":
            credit = request.credit
            session.add_credit(credit.job, credit.sequence, credit.tokens)
        case "cancel":
            cancel = request.cancel
            session.cancel(cancel.job, cancel.sequence if cancel.HasField("sequence") else None)
        case "coalesce":
            session.coalesce(request.coalesce.hold_ms)


def _messages(
    letter: Letter, engine: Engine, residency: Residency
) -> list[worker_service_pb2.SessionResponse]:
    free_slots = engine.pulse.free_slots
    messages = [
        worker_service_pb2.SessionResponse(refused=refused(refusal, free_slots, residency.epoch))
        for refusal in letter.refusals
    ]
    if letter.outputs:
        step = worker_service_pb2.Step(outputs=[step_output(output) for output in letter.outputs])
        messages.append(worker_service_pb2.SessionResponse(step=step))
    return messages


def _gateway_id(context: Context) -> str:
    """The caller's name for the log; whatever is no id stays out of it."""
    for key, value in context.invocation_metadata() or ():
        if key == GATEWAY_ID_KEY and isinstance(value, str) and is_valid_id(value):
            return value
    return ""
