"""Uploads as messages. Owns: how manifests and chunks of the contract become the controller's own data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import MappingProxyType

from google.protobuf.message import DecodeError
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2

from services.common.artifacts import FILES_MAX
from services.common.errors import ArgumentInvalid
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.member_messages import DTYPES, QUANTIZATIONS
from services.controller.core.catalog import GoldenPrompt, Manifest, ModelFile

# Longer than any model's context.
CONTEXT_TOKENS_MAX = 1 << 24
# Every worker answers them one after the other before it is ready; some seconds, and no benchmark.
GOLDEN_PROMPTS_MAX = 16
GOLDEN_CHARS_MAX = 4_096
GOLDEN_TOKENS_MAX = 256
GOLDEN_TOKENS_DEFAULT = 32

_QUANTIZATIONS = MappingProxyType({number: name for name, number in QUANTIZATIONS.items()})
_DTYPES = MappingProxyType({number: name for name, number in DTYPES.items()})


def read_manifest(message: model_pb2.Manifest) -> Manifest:
    """A manifest as it was sent; where its sender says that files lie is nobody's business.

    Raises:
        ArgumentInvalid: A field is missing, or one that this version does not serve is set.
    """
    if not message.model:
        raise ArgumentInvalid("manifest.model: missing.")
    if message.quantization not in _QUANTIZATIONS or message.compute_dtype not in _DTYPES:
        raise ArgumentInvalid("manifest: quantization or compute_dtype is not one that is known.")
    if not 1 <= message.context_tokens <= CONTEXT_TOKENS_MAX:
        raise ArgumentInvalid(f"manifest.context_tokens: must be 1 to {CONTEXT_TOKENS_MAX}.")
    # Counted before one is read: a message has room for two million, and reading those takes seconds.
    if len(message.files) > FILES_MAX:
        raise ArgumentInvalid(f"manifest.files: more than {FILES_MAX}.")
    if len(message.golden_prompts) > GOLDEN_PROMPTS_MAX:
        raise ArgumentInvalid(f"manifest.golden_prompts: more than {GOLDEN_PROMPTS_MAX}.")
    return Manifest(
        model=message.model,
        revision=message.revision,
        files=tuple(ModelFile(file.path, file.size_bytes, file.sha256) for file in message.files),
        quantization=_QUANTIZATIONS[message.quantization],
        compute_dtype=_DTYPES[message.compute_dtype],
        context_tokens=message.context_tokens,
        tokenizer_sha256=message.tokenizer_sha256,
        golden_prompts=tuple(_read_golden(one) for one in message.golden_prompts),
        fallback_model=message.fallback_model,
    )


def _read_golden(message: model_pb2.GoldenPrompt) -> GoldenPrompt:
    for name, text in (("text", message.text), ("expected", message.expected)):
        if not 1 <= len(text) <= GOLDEN_CHARS_MAX:
            raise ArgumentInvalid(
                f"manifest.golden_prompts.{name}: must have 1 to {GOLDEN_CHARS_MAX} characters."
            )
    max_tokens = message.max_tokens if message.HasField("max_tokens") else GOLDEN_TOKENS_DEFAULT
    if not 1 <= max_tokens <= GOLDEN_TOKENS_MAX:
        raise ArgumentInvalid(f"manifest.golden_prompts.max_tokens: must be 1 to {GOLDEN_TOKENS_MAX}.")
    return GoldenPrompt(message.text, message.expected, max_tokens)


async def read_chunks(requests: AsyncIterator[pb.UploadRevisionRequest]) -> AsyncIterator[Chunk]:
    """The chunks that follow the manifest.

    Raises:
        ArgumentInvalid: Something else follows it.
    """
    try:
        async for request in requests:
            if request.WhichOneof("part") != "chunk":
                raise ArgumentInvalid("After its manifest an upload sends chunks.")
            yield Chunk(request.chunk.sha256, request.chunk.offset, request.chunk.data)
    except DecodeError:
        raise ArgumentInvalid("A message of the upload cannot be read.") from None
