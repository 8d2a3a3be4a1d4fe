"""Bodies on their way. Owns: in which pieces they go, and what is too much for the loop. Knows no API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from google.api.httpbody_pb2 import HttpBody

from services.common.threads import in_thread
from services.gateway.http.whole import Answer

# Envoy's transcoder ends a reply with a message over 1 MiB, and gRPC sends none over 4 MiB. What is far
# smaller it passes on as it comes.
PART_BYTES_MAX = 1 << 18

# What is read on the loop. It takes some milliseconds at worst; a body at Envoy's limit would take a tenth of
# a second, in which no stream gets its tokens.
LOOP_BYTES_MAX = 1 << 16

T = TypeVar("T")


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


async def in_parts(bodies: AsyncGenerator[HttpBody, None]) -> AsyncGenerator[HttpBody, None]:
    """The bodies as messages that pass every limit on their way; a client sees the bytes of each as one body.

    Whoever closes it closes `bodies`.
    """
    async with aclosing(bodies):
        async for body in bodies:
            data = body.data
            if len(data) <= PART_BYTES_MAX:
                yield body
                continue
            for at in range(0, len(data), PART_BYTES_MAX):
                yield HttpBody(content_type=body.content_type, data=data[at : at + PART_BYTES_MAX])
