"""Messages to and from workers. Owns: the translation between core and wire of orders and outputs."""

from __future__ import annotations

from interlock.v1 import generation_pb2, worker_service_pb2

from services.gateway.core.attempts import Output, WorkOrder
from services.gateway.core.events import FinishReason, TokenLogprob
from services.gateway.core.params import FormatKind, OutputFormat, SamplingParams


def start_job(order: WorkOrder) -> worker_service_pb2.StartJob:
    """An order as a worker reads it."""
    emitted = [
        worker_service_pb2.EmittedTokens(
            sequence=sequence, token_ids=token_ids, ended=sequence in order.ended
        )
        for sequence, token_ids in enumerate(order.emitted)
        if token_ids or sequence in order.ended
    ]
    return worker_service_pb2.StartJob(
        job=order.job_id,
        attempt=order.attempt,
        model=order.model,
        revision=order.revision,
        epoch=order.epoch,
        prompt_ids=order.prompt_ids,
        emitted=emitted,
        max_tokens=order.max_tokens,
        sampling=sampling_message(order.sampling),
        n=len(order.emitted),
        logprobs=order.logprobs,
        format=None if order.form is None else format_message(order.form),
        credit_tokens=order.credit_tokens,
        request_id=order.request_id,
    )


def sampling_message(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    """The parameters on the wire; what the caller left out stays absent."""
    return generation_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
    )


def format_message(form: OutputFormat) -> generation_pb2.OutputFormat:
    """The format on the wire."""
    match form.kind:
        case FormatKind.JSON_SCHEMA:
            return generation_pb2.OutputFormat(json_schema=form.texts[0])
        case FormatKind.REGEX:
            return generation_pb2.OutputFormat(regex=form.texts[0])
        case FormatKind.CHOICE:
            return generation_pb2.OutputFormat(choice=generation_pb2.ChoiceFormat(choices=form.texts))
        case FormatKind.GRAMMAR:
            return generation_pb2.OutputFormat(grammar=form.texts[0])
        case None:
            return generation_pb2.OutputFormat()


def read_output(
    output: worker_service_pb2.StepOutput, finish: FinishReason | None, *, others: int = 0
) -> Output:
    """What a worker produced.

    Args:
        output: The message.
        finish: Its reason, where the sequence ended as it should.
        others: How many other sequences of the attempt have not ended.
    """
    return Output(
        output.index,
        tuple(output.token_ids),
        finish,
        output.cached_prompt_tokens,
        tuple(map(_read_logprob, output.logprobs)),
        output.sequence,
        others,
    )


def _read_logprob(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        message.logprob, tuple((other.token_id, other.logprob) for other in message.alternatives)
    )
