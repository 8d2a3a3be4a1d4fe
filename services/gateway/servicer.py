"""The gRPC face. Owns: the translation between `interlock.v1` and the reception; it decides nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from google.protobuf import duration_pb2, timestamp_pb2
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2, model_pb2

from services.common import allowance, logs
from services.common.conversation import Message
from services.common.grpc_types import Context
from services.gateway.core import validation
from services.gateway.core.catalog import CatalogEntry
from services.gateway.core.events import Chunk, Event, Finished, FinishReason, Queued, Started, TokenLogprob
from services.gateway.core.jobs import Principal
from services.gateway.core.params import (
    STOPS_MAX,
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.dispatcher.reception import GENERATE_SCOPE, MODELS_SCOPE, Reception
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.dispatcher.usage import Usage, UsageDesk
from services.gateway.hanging_up import hanging_up

REQUEST_ID_KEY = "x-request-id"
REVISION_KEY = "x-interlock-revision"
WORKER_KEY = "x-interlock-worker"

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


class GatewayServicer(gateway_service_pb2_grpc.GatewayServiceServicer):
    """`interlock.v1.GatewayService` over a reception, and the desk that knows of usage."""

    def __init__(self, reception: Reception, usage_desk: UsageDesk) -> None:
        self._reception = reception
        self._usage_desk = usage_desk

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See the contract."""
        metadata = tuple(context.invocation_metadata() or ())
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        request_id = self._reception.request_id(
            request.request_id if request.HasField("request_id") else None
        )
        logs.annotate(request_id=request_id, subject=principal.subject)
        timeout_s = self._reception.timeout_s(metadata, context.time_remaining())
        if request.HasField("tokens"):
            self._reception.check_tokens(_model_of(request), len(request.tokens.ids))
        asked = read_request(request)
        stream = await self._reception.generate(principal, request_id, asked, timeout_s)
        async with aclosing(stream):
            stream.watched(hanging_up(context))
            # A client of gRPC hears of its place in the queue at once; only what is known is named here.
            await context.send_initial_metadata(response_metadata(request_id, stream))
            async for event in stream:
                note_worker(event)
                yield _response(stream.cursor, event)

    async def ResumeGeneration(
        self, request: pb.ResumeGenerationRequest, context: Context
    ) -> AsyncIterator[pb.ResumeGenerationResponse]:
        """See the contract."""
        metadata = tuple(context.invocation_metadata() or ())
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        request_id = self._reception.request_id(request.request_id)
        logs.annotate(request_id=request_id, subject=principal.subject, cursor=request.cursor)
        stream = await self._reception.resume(principal, request_id, request.cursor)
        async with aclosing(stream):
            stream.watched(hanging_up(context))
            await context.send_initial_metadata(response_metadata(request_id, stream))
            async for event in stream:
                note_worker(event)
                # The two messages have the same fields, by the contract.
                yield pb.ResumeGenerationResponse.FromString(
                    _response(stream.cursor, event).SerializeToString()
                )

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        """See the contract."""
        metadata = tuple(context.invocation_metadata() or ())
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        request_id = self._reception.request_id(request.request_id)
        logs.annotate(request_id=request_id, subject=principal.subject)
        cancelled = await self._reception.cancel(principal, request_id)
        return pb.CancelGenerationResponse(cancelled=cancelled)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        """See the contract."""
        metadata = tuple(context.invocation_metadata() or ())
        principal = self._reception.authenticate(metadata, GENERATE_SCOPE)
        timeout_s = self._reception.timeout_s(metadata, context.time_remaining())
        prompt = _read_prompt(request)
        count = await self._reception.count(principal, _model_of(request), prompt, timeout_s)
        return pb.CountTokensResponse(
            prompt_tokens=count.prompt_tokens,
            context_tokens=count.entry.context_tokens,
            model=count.entry.model,
            revision=count.entry.revision,
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """See the contract."""
        del request
        self._authenticate(context, MODELS_SCOPE, GENERATE_SCOPE)
        listed = enumerate(self._reception.models())
        models = [_model(entry, is_default=at == 0 and not entry.secondary) for at, entry in listed]
        return pb.ListModelsResponse(models=sorted(models, key=lambda model: model.name))

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:
        """See the contract."""
        del request
        principal = self._authenticate(context, GENERATE_SCOPE)
        return _usage(principal, await self._usage_desk.report(principal))

    def _authenticate(self, context: Context, *scopes: str) -> Principal:
        return self._reception.authenticate(tuple(context.invocation_metadata() or ()), *scopes)


def response_metadata(request_id: str, stream: AnswerStream | None) -> tuple[tuple[str, str], ...]:
    """What the initial metadata of every generation names, as far as it is known."""
    named = ((REQUEST_ID_KEY, request_id),)
    if stream is None:
        return named
    known = (*named, *allowance.headers(stream.allowance))
    if (started := stream.started) is None:
        return known
    return (*known, (REVISION_KEY, started.revision), (WORKER_KEY, started.worker_id))


def note_worker(event: Event) -> None:
    """Lets the call's log line name the worker that answers."""
    if isinstance(event, Started):
        logs.annotate(revision=event.revision, worker_id=event.worker_id)


def read_request(request: pb.GenerateRequest) -> GenerationRequest:
    """The request as the core speaks of it; what is absent is None.

    A message of 4 MiB holds two million turns or strings, which take seconds to read, so they are counted
    first. What bounds token ids is the model's context: see `Reception.check_tokens`.

    Raises:
        ArgumentInvalid: There are more of something than may be.
    """
    validation.check_stops(len(request.stop), STOPS_MAX)
    return GenerationRequest(
        request_id=request.request_id if request.HasField("request_id") else None,
        model=_model_of(request),
        prompt=_read_prompt(request),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        sampling=_read_sampling(request.sampling),
        stop=tuple(request.stop),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        n=request.n if request.HasField("n") else None,
        form=_read_format(request.format) if request.HasField("format") else None,
        priority=int(request.priority),
        resumable=request.resumable,
    )


def _model_of(request: pb.GenerateRequest | pb.CountTokensRequest) -> str | None:
    return request.model if request.HasField("model") else None


def _read_prompt(request: pb.GenerateRequest | pb.CountTokensRequest) -> Prompt | None:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            turns = request.chat.messages
            validation.check_turns(len(turns))
            return ChatPrompt(tuple(Message(turn.role, turn.content) for turn in turns))
        case "tokens":
            assert isinstance(request, pb.GenerateRequest)
            return TokenPrompt(tuple(request.tokens.ids))
    return None


def _read_sampling(message: generation_pb2.SamplingParams) -> SamplingParams:
    validation.check_biases(len(message.logit_bias))
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        min_p=message.min_p if message.HasField("min_p") else None,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else None,
        presence_penalty=message.presence_penalty if message.HasField("presence_penalty") else None,
        frequency_penalty=message.frequency_penalty if message.HasField("frequency_penalty") else None,
        seed=message.seed if message.HasField("seed") else None,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def _read_format(message: generation_pb2.OutputFormat) -> OutputFormat:
    match message.WhichOneof("format"):
        case "json_schema":
            return OutputFormat(FormatKind.JSON_SCHEMA, (message.json_schema,))
        case "regex":
            return OutputFormat(FormatKind.REGEX, (message.regex,))
        case "choice":
            validation.check_choices(len(message.choice.choices))
            return OutputFormat(FormatKind.CHOICE, tuple(message.choice.choices))
        case "grammar":
            return OutputFormat(FormatKind.GRAMMAR, (message.grammar,))
    return OutputFormat(None)


def _response(cursor: int, event: Event) -> pb.GenerateResponse:
    match event:
        case Queued():
            return pb.GenerateResponse(cursor=cursor, queued=_queued(event))
        case Started():
            return pb.GenerateResponse(cursor=cursor, started=_started_message(event))
        case Chunk(index, text, token_ids, logprobs, sequence):
            scores = [_logprob(one) for one in logprobs]
            chunk = generation_pb2.Chunk(
                sequence=sequence, index=index, text=text, token_ids=token_ids, logprobs=scores
            )
            return pb.GenerateResponse(cursor=cursor, chunk=chunk)
        case Finished():
            return pb.GenerateResponse(cursor=cursor, finished=_finished(event))


def _logprob(score: TokenLogprob) -> generation_pb2.TokenLogprob:
    alternatives = [
        generation_pb2.TokenAlternative(token_id=token_id, logprob=logprob)
        for token_id, logprob in score.alternatives
    ]
    return generation_pb2.TokenLogprob(logprob=score.logprob, alternatives=alternatives)


def _queued(event: Queued) -> generation_pb2.Queued:
    wait_s = event.estimated_wait_s
    return generation_pb2.Queued(
        position=event.position, estimated_wait=None if wait_s is None else _duration(wait_s)
    )


def _started_message(event: Started) -> generation_pb2.Started:
    return generation_pb2.Started(
        request_id=event.request_id,
        model=event.model,
        revision=event.revision,
        worker_id=event.worker_id,
        attempt=event.attempt,
        queue_time=_duration(event.queue_s),
        degraded=event.degraded,
    )


def _finished(event: Finished) -> generation_pb2.Finished:
    usage, timings = event.usage, event.timings
    return generation_pb2.Finished(
        sequence=event.sequence,
        reason=_REASONS[event.reason],
        stop_text=event.stop_text,
        usage=generation_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=usage.completion_tokens,
        ),
        timings=generation_pb2.Timings(
            queue=_duration(timings.queue_s),
            prefill=_duration(timings.prefill_s),
            decode=_duration(timings.decode_s),
            total=_duration(timings.total_s),
        ),
    )


def _usage(principal: Principal, usage: Usage) -> pb.GetUsageResponse:
    limits = principal.limits
    start = timestamp_pb2.Timestamp()
    start.FromMilliseconds(round(usage.window_start_s * 1000))
    return pb.GetUsageResponse(
        tenant=principal.subject,
        window_start=start,
        window=_duration(usage.window_s),
        used_tokens=usage.used_tokens,
        reserved_tokens=usage.reserved_tokens,
        tokens_per_minute=limits.tokens_per_minute,
        running=usage.running,
        concurrency=limits.concurrency,
        weight=limits.weight,
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(seconds * 1_000_000))
    return duration


def _model(entry: CatalogEntry, *, is_default: bool) -> model_pb2.Model:
    return model_pb2.Model(
        name=entry.model,
        revision=entry.revision,
        context_tokens=entry.context_tokens,
        quantization=model_pb2.Quantization.ValueType(entry.quantization),
        is_default=is_default,
    )
