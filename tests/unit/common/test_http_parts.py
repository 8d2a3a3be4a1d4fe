"""Bodies of HTTP methods: large ones go as messages that Envoy and gRPC take."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody

from services.common.interceptors import HTTP_PART_BYTES_MAX, HttpParts

METHOD = "/interlock.http.v1.AdminHttpService/ListRollouts"


async def sent(size: int, method: str = METHOD) -> list[HttpBody]:
    """The messages of a body of so many bytes."""

    async def inner(request: bytes, context: Any) -> AsyncIterator[HttpBody]:
        del context
        yield HttpBody(content_type="text/plain", data=request)

    handler: Any = grpc.unary_stream_rpc_method_handler(inner)

    async def found(_: Any) -> Any:
        return handler

    interceptor, details = HttpParts(), cast(grpc.HandlerCallDetails, SimpleNamespace(method=method))
    wrapped: Any = await interceptor.intercept_service(found, details)
    # Whoever keeps what was made of a handler finds the same one.
    again: Any = await interceptor.intercept_service(found, details)
    assert again is wrapped
    return [part async for part in wrapped.unary_stream(data_of(size), None)]


def data_of(size: int) -> bytes:
    """Bytes that are not all alike."""
    return bytes(at % 251 for at in range(size))


@pytest.mark.parametrize(
    "size", [0, 1, HTTP_PART_BYTES_MAX, HTTP_PART_BYTES_MAX + 1, 5 * HTTP_PART_BYTES_MAX + 7]
)
async def test_the_parts_of_a_body_are_its_bytes(size: int) -> None:
    """None is over the limit, each has the type, and there are no more than are needed."""
    parts = await sent(size)
    assert b"".join(part.data for part in parts) == data_of(size)
    assert all(part.content_type == "text/plain" and len(part.data) <= HTTP_PART_BYTES_MAX for part in parts)
    assert len(parts) == max(1, -(-size // HTTP_PART_BYTES_MAX))


async def test_what_is_no_body_is_left_alone() -> None:
    """Whoever speaks gRPC gets each message as it is."""
    (whole,) = await sent(2 * HTTP_PART_BYTES_MAX, "/interlock.v1.GatewayService/Generate")
    assert len(whole.data) == 2 * HTTP_PART_BYTES_MAX
