"""Requests as text. Owns: the form in which a resumable request is kept, so that another gateway can go on.

JSON, read field by field: nothing in it is code. The tokenizer is not in it; every gateway has its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from services.common.errors import ArgumentInvalid
from services.gateway.core.jobs import Band
from services.gateway.core.log import TakenUp
from services.gateway.core.params import (
    FormatKind,
    GenerationJob,
    GenerationParams,
    GenerationRequest,
    OutputFormat,
    SamplingParams,
    TokenPrompt,
    Words,
)
from services.gateway.core.tenancy import TenantLimits

# The store keeps it for as long as the request lives. A prompt of 64 Ki tokens takes about 400 KB.
PAYLOAD_BYTES_MAX = 1 << 20


def digest_of(model: str, request: GenerationRequest) -> str:
    """Names what a request asks: equal for a repetition, different for another body under the same id.

    Gateways of different versions must agree on it.
    """
    prompt = request.prompt
    asked = asdict(replace(request, request_id=None, model=model, prompt=None))
    if prompt is not None:
        # `asdict` would copy a hundred thousand ids one by one and hold the loop up for a tenth of a second.
        asked["prompt"] = {"ids": prompt.ids} if isinstance(prompt, TokenPrompt) else asdict(prompt)
    text = json.dumps([type(prompt).__name__, asked], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_payload(job: GenerationJob) -> str:
    """Returns what `read_payload` needs to go on with the job.

    Raises:
        ArgumentInvalid: It is longer than the store shall keep.
    """
    params = job.params
    text = json.dumps(
        {
            "job_id": job.job_id,
            "request_id": job.request_id,
            "tenant": job.tenant,
            "model": job.model,
            "prompt_ids": job.prompt_ids,
            "max_tokens": params.max_tokens,
            "sampling": asdict(params.sampling),
            "stop": params.stop,
            "logprobs": params.logprobs,
            "n": params.n,
            "form": None if params.form is None else _form_fields(params.form),
            "band": int(job.band),
            "limits": asdict(job.limits),
            "digest": job.digest,
        },
        separators=(",", ":"),
    )
    if len(text) > PAYLOAD_BYTES_MAX:
        raise ArgumentInvalid("resumable: the request is too long to be kept; ask without it.")
    return text


def read_payload(taken: TakenUp, words: Words) -> GenerationJob:
    """The job that was taken up, under its new submission and with the time that it has left."""
    fields: dict[str, Any] = json.loads(taken.payload)
    sampling = fields["sampling"]
    bias = tuple((int(token), float(value)) for token, value in sampling.pop("logit_bias"))
    form = fields["form"]
    return GenerationJob(
        job_id=fields["job_id"],
        request_id=fields["request_id"],
        tenant=fields["tenant"],
        model=fields["model"],
        prompt_ids=tuple(fields["prompt_ids"]),
        params=GenerationParams(
            fields["max_tokens"],
            SamplingParams(**sampling, logit_bias=bias),
            tuple(fields["stop"]),
            fields["logprobs"],
            None if form is None else OutputFormat(FormatKind(form["kind"]), tuple(form["texts"])),
            fields.get("n", 1),
        ),
        band=Band(fields["band"]),
        timeout_s=taken.waited_s + taken.left_s,
        submission=taken.submission,
        words=words,
        limits=TenantLimits(**fields["limits"]),
        digest=fields["digest"],
        resumable=True,
        waited_s=taken.waited_s,
    )


def _form_fields(form: OutputFormat) -> dict[str, Any]:
    return {"kind": form.kind, "texts": form.texts}
