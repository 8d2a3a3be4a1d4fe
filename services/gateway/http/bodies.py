"""Bodies that are read and written. Owns: what is too much for the loop, how JSON is written. No API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.api.httpbody_pb2 import HttpBody

from services.common.threads import in_thread
from services.gateway.http.whole import Answer

# What is read on the loop. It takes some milliseconds at worst; a body at Envoy's limit would take a tenth of
# a second, in which no stream gets its tokens.
LOOP_BYTES_MAX = 1 << 16

T = TypeVar("T")

# Made once: every token of every stream is written by it. What JSON cannot spell must not be written as if.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dump(fields: Mapping[str, Any]) -> bytes:
    """JSON as short as it can be said. Raises ValueError for NaN and infinity, which it cannot say."""
    return _ENCODER.encode(fields).encode()


async def read_body(body: HttpBody, read: Callable[[bytes, str], T]) -> T:
    """What `read` makes of a body and its content type; of a large one in a thread. Raises what it raises."""
    data = body.data
    if len(data) > LOOP_BYTES_MAX:
        return await in_thread(read, data, body.content_type)
    return read(data, body.content_type)


async def written(answer: Answer, write: Callable[[Answer], bytes]) -> bytes:
    """The body that `write` makes of an answer; in a thread where it has scores, which take a second."""
    if any(chunk.logprobs for said in answer.sequences for chunk in said.chunks):
        return await in_thread(write, answer)
    return write(answer)
