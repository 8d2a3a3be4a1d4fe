"""Messages about jobs. Owns: the translation between the core's jobs and outputs and those of the mesh."""

from __future__ import annotations

from dataclasses import replace

from interlock.v1 import generation_pb2, worker_service_pb2

from services.common.sampling_bounds import is_greedy
from services.worker.core.admission import JobStart, Refusal
from services.worker.core.format import Format, FormatKind
from services.worker.core.sequence import Output, Sampling, SequenceKey, SequenceStart, TokenScore

# The contract's bound.
SEQUENCES_MAX = 4

# Job ids are digests of 64 digits; this only keeps nonsense out of logs and tables.
JOB_CHARS_MAX = 128


def unserved(start: worker_service_pb2.StartJob) -> str | None:
    """What the job asks for and this worker does not do; nothing is silently ignored."""
    sampling = start.sampling
    asked = {
        "job": not 0 < len(start.job) <= JOB_CHARS_MAX,
        "n": start.n > SEQUENCES_MAX,
        "emitted": _is_muddled(start),
        "format": start.HasField("format") and start.format.WhichOneof("format") is None,
        "sampling.top_k": sampling.HasField("top_k") and sampling.top_k < 1,
        "sampling.seed": not is_greedy(sampling.temperature) and not sampling.HasField("seed"),
    }
    fields = [name for name, wrong in asked.items() if wrong]
    return f"Not served by this worker: {', '.join(fields)}." if fields else None


def key_of(start: worker_service_pb2.StartJob, session: int) -> SequenceKey:
    """The job's name within this process."""
    return SequenceKey(session, start.job, start.attempt)


def read_job(start: worker_service_pb2.StartJob, session: int) -> JobStart:
    """The job as the core knows it."""
    first = SequenceStart(
        key=key_of(start, session),
        prompt_ids=tuple(start.prompt_ids),
        max_tokens=start.max_tokens,
        credit_tokens=start.credit_tokens,
        sampling=_sampling(start.sampling),
        logprobs=start.logprobs if start.HasField("logprobs") else None,
    )
    emitted = {one.sequence: tuple(one.token_ids) for one in start.emitted}
    starts = tuple(
        replace(first, key=replace(first.key, sequence=sequence), emitted_ids=emitted.get(sequence, ()))
        for sequence in _open_sequences(start)
    )
    form = _format(start.format) if start.HasField("format") else None
    return JobStart(start.model, start.revision, start.epoch, starts, start.request_id, form)


def step_output(output: Output) -> worker_service_pb2.StepOutput:
    """An output as the gateway reads it."""
    finish = output.finish
    return worker_service_pb2.StepOutput(
        job=output.key.job,
        attempt=output.key.attempt,
        sequence=output.key.sequence,
        index=output.index,
        token_ids=output.token_ids,
        cached_prompt_tokens=output.cached_prompt_tokens,
        logprobs=[_logprob(score) for score in output.scores],
        finish=generation_pb2.FINISH_REASON_UNSPECIFIED
        if finish is None
        else generation_pb2.FinishReason.Value(f"FINISH_REASON_{finish.value}"),
        flaw=output.flaw,
    )


def refused(refusal: Refusal, free_slots: int, epoch: int) -> worker_service_pb2.Refused:
    """A refusal as the gateway reads it."""
    return worker_service_pb2.Refused(
        job=refusal.key.job,
        attempt=refusal.key.attempt,
        reason=worker_service_pb2.RefusalReason.Value(f"REFUSAL_REASON_{refusal.reason.value}"),
        free_slots=free_slots,
        epoch=epoch,
        message=refusal.message,
    )


def _open_sequences(start: worker_service_pb2.StartJob) -> list[int]:
    ended = {one.sequence for one in start.emitted if one.ended}
    return [sequence for sequence in range(max(start.n, 1)) if sequence not in ended]


def _is_muddled(start: worker_service_pb2.StartJob) -> bool:
    """Whether what was emitted is not of the job's sequences, or told twice, or leaves none to go on with."""
    told = [one.sequence for one in start.emitted]
    strange = any(sequence >= max(start.n, 1) for sequence in told)
    return strange or len(set(told)) < len(told) or not _open_sequences(start)


def _sampling(params: generation_pb2.SamplingParams) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        # In the order of ids: a map has none, and sums must not depend on it.
        logit_bias=tuple(sorted(params.logit_bias.items())),
    )


def _format(message: generation_pb2.OutputFormat) -> Format:
    kind = FormatKind(str(message.WhichOneof("format")))
    if kind is FormatKind.CHOICE:
        return Format(kind, tuple(message.choice.choices))
    return Format(kind, (getattr(message, kind.value),))


def _logprob(score: TokenScore) -> generation_pb2.TokenLogprob:
    alternatives = [
        generation_pb2.TokenAlternative(token_id=token_id, logprob=logprob)
        for token_id, logprob in score.alternatives
    ]
    return generation_pb2.TokenLogprob(logprob=score.logprob, alternatives=alternatives)
