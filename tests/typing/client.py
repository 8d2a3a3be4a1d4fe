"""A client as a type checker sees it: mypy reads this file, nothing runs it."""

from __future__ import annotations

from typing import assert_type

import grpc
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, generation_pb2


async def generate(address: str) -> str:
    """The stubs are precise: what streams out has the response's type, absent fields can be asked for."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        request = pb.GenerateRequest(text="Hi", sampling=generation_pb2.SamplingParams(seed=1))
        text = ""
        async for event in stub.Generate(request):
            assert_type(event, pb.GenerateResponse)
            assert_type(event.cursor, int)
            assert_type(event.chunk.text, str)
            text += event.chunk.text
        assert_type(request.HasField("max_tokens"), bool)
    return text
