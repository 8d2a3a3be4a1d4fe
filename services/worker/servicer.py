"""The servicer. Owns: the translation between `interlock.v1.WorkerService` and the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from interlock.v1 import generation_pb2, worker_service_pb2, worker_service_pb2_grpc

from services.common import logs
from services.common.clock import Clock
from services.common.credential import GATEWAY_ID_KEY
from services.common.grpc_types import Context
from services.common.ids import is_valid_id
from services.worker.adapters.worker_messages import resident_revisions, worker_load
from services.worker.core.admission import JobStart, Reason, Refusal
from services.worker.core.outbox import Letter
from services.worker.core.revision import Residency
from services.worker.core.sequence import Output, Sampling, SequenceKey, SequenceStart
from services.worker.engine import Engine, EngineSession

SERVICE = "interlock.v1.WorkerService"

# A gateway misses two of these before it gives a worker up.
ALIVE_INTERVAL_S = 1.0

# Job ids are digests of 64 digits; this only keeps nonsense out of logs and tables.
JOB_CHARS_MAX = 128


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
            step=pulse.steps, free_slots=pulse.free_slots, paused_jobs=session.paused_jobs
        )
        return worker_service_pb2.SessionResponse(alive=alive)


async def _read(requests: AsyncIterator[worker_service_pb2.SessionRequest], session: EngineSession) -> None:
    try:
        async for request in requests:
            _dispatch(request, session)
    finally:
        session.close()


def _dispatch(request: worker_service_pb2.SessionRequest, session: EngineSession) -> None:
    match request.WhichOneof("command"):
        case "start":
            flaw = _unsupported(request.start)
            if flaw is None:
                session.start(_job_start(request.start, session.number))
            else:
                session.refuse(Refusal(_key(request.start, session.number), Reason.INVALID, flaw))
        case "credit":
            session.add_credit(request.credit.job, request.credit.tokens)
        case "cancel":
            session.cancel(request.cancel.job)


def _unsupported(start: worker_service_pb2.StartJob) -> str | None:
    """What the job asks for and this worker does not do; nothing is silently ignored."""
    sampling = start.sampling
    asked = {
        "job": not 0 < len(start.job) <= JOB_CHARS_MAX,
        "n": start.n > 1,
        "emitted": len(start.emitted) > 1 or any(one.sequence for one in start.emitted),
        "logprobs": start.HasField("logprobs"),
        "format": start.HasField("format"),
        "sampling.repetition_penalty": sampling.HasField("repetition_penalty")
        and sampling.repetition_penalty != 1,
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.logit_bias": bool(sampling.logit_bias),
        "sampling.top_k": sampling.HasField("top_k") and sampling.top_k < 1,
        "sampling.seed": sampling.temperature != 0 and not sampling.HasField("seed"),
    }
    fields = [name for name, wrong in asked.items() if wrong]
    return f"Not served by this worker: {', '.join(fields)}." if fields else None


def _job_start(start: worker_service_pb2.StartJob, session: int) -> JobStart:
    sequence = SequenceStart(
        key=_key(start, session),
        prompt_ids=tuple(start.prompt_ids),
        max_tokens=start.max_tokens,
        emitted_ids=tuple(start.emitted[0].token_ids) if start.emitted else (),
        credit_tokens=start.credit_tokens,
        sampling=_sampling(start.sampling),
    )
    return JobStart(start.model, start.revision, start.epoch, sequence, start.request_id)


def _key(start: worker_service_pb2.StartJob, session: int) -> SequenceKey:
    return SequenceKey(session, start.job, start.attempt)


def _sampling(params: generation_pb2.SamplingParams) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        min_p=params.min_p,
        seed=params.seed,
    )


def _messages(
    letter: Letter, engine: Engine, residency: Residency
) -> list[worker_service_pb2.SessionResponse]:
    messages = [
        worker_service_pb2.SessionResponse(
            refused=worker_service_pb2.Refused(
                job=refusal.key.job,
                attempt=refusal.key.attempt,
                reason=worker_service_pb2.RefusalReason.Value(f"REFUSAL_REASON_{refusal.reason.value}"),
                free_slots=engine.pulse.free_slots,
                epoch=residency.epoch,
                message=refusal.message,
            )
        )
        for refusal in letter.refusals
    ]
    if letter.outputs:
        step = worker_service_pb2.Step(outputs=[_step_output(output) for output in letter.outputs])
        messages.append(worker_service_pb2.SessionResponse(step=step))
    return messages


def _step_output(output: Output) -> worker_service_pb2.StepOutput:
    finish = output.finish
    return worker_service_pb2.StepOutput(
        job=output.key.job,
        attempt=output.key.attempt,
        sequence=output.key.sequence,
        index=output.index,
        token_ids=output.token_ids,
        cached_prompt_tokens=output.cached_prompt_tokens,
        finish=generation_pb2.FINISH_REASON_UNSPECIFIED
        if finish is None
        else generation_pb2.FinishReason.Value(f"FINISH_REASON_{finish.value}"),
    )


def _gateway_id(context: Context) -> str:
    """The caller's name for the log; whatever is no id stays out of it."""
    for key, value in context.invocation_metadata() or ():
        if key == GATEWAY_ID_KEY and isinstance(value, str) and is_valid_id(value):
            return value
    return ""
