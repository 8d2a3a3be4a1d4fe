"""Whose messages are read: of a call without a good token none is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from services.common.interceptors import TokenFirst
from services.common.tokens import TokenVerifier, mint

SECRET = "s" * 32
METHOD = "/a.Service/Method"
GOOD = mint(SECRET, subject="alice", scopes=("generate",), ttl_s=3_600.0)


class Calls:
    """What was decoded and what reached the handler, behind the interceptor."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []

    async def call(self, data: bytes, token: str, *, method: str = METHOD) -> Any:
        """What the handler was given."""
        return (await self._handler(method)).unary_unary(data, cast(Any, _Context(token)))

    async def _handler(self, method: str) -> Any:
        handler: Any = grpc.unary_unary_rpc_method_handler(
            lambda request, _: request, request_deserializer=self._decode
        )

        async def found(_: Any) -> Any:
            return handler

        details = cast(grpc.HandlerCallDetails, SimpleNamespace(method=method))
        found_handler: Any = await TokenFirst(
            TokenVerifier(SECRET).believes, ("/a.Service/",)
        ).intercept_service(found, details)
        self.given = handler
        return found_handler

    def _decode(self, data: bytes) -> str:
        self.decoded.append(data)
        return data.decode()


class _Context:
    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def invocation_metadata(self) -> Any:
        """What came with the call."""
        return self._metadata


@pytest.mark.parametrize(
    "token", ["", "nonsense", GOOD + "x", mint("x" * 32, subject="alice", scopes=(), ttl_s=60.0)]
)
async def test_without_a_good_token_a_message_is_empty(token: str) -> None:
    """The handler is called all the same: it says what is wrong with the token, in its own words."""
    calls = Calls()
    assert await calls.call(b"4 MB", token) == ""
    assert calls.decoded == [b""]


async def test_with_a_good_token_a_message_is_read() -> None:
    """As it came."""
    calls = Calls()
    assert await calls.call(b"hi", GOOD) == "hi"
    assert calls.decoded == [b"hi"]


async def test_other_services_are_left_alone() -> None:
    """Health asks for no token, and members of the mesh have another one."""
    calls = Calls()
    assert await calls._handler("/b.Service/Method") is calls.given
