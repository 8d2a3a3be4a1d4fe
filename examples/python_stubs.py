"""Asks a mesh with the stubs alone: grpcio and protobuf are all that is installed for it.

python examples/python_stubs.py HOST:PORT TOKEN PROMPT
    [--max-tokens N] [--deadline SECONDS] [--cancel-after CHUNKS]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import grpc
from interlock.v1.gateway_service_pb2 import GenerateRequest
from interlock.v1.gateway_service_pb2_grpc import GatewayServiceStub


def main() -> int:
    """Prints one answer as it comes; 1 where it fails, with the status and the mesh's own reason."""
    arguments = _parser().parse_args()
    request = GenerateRequest(text=arguments.prompt, max_tokens=arguments.max_tokens)
    with grpc.insecure_channel(arguments.address) as channel:
        stub: Any = GatewayServiceStub(channel)
        metadata = [("authorization", f"Bearer {arguments.token}")]
        call = stub.Generate(request, metadata=metadata, timeout=arguments.deadline)
        chunks = 0
        try:
            for event in call:
                if event.HasField("chunk"):
                    print(event.chunk.text, end="", flush=True)
                    chunks += 1
                if chunks == arguments.cancel_after:
                    call.cancel()
        except grpc.RpcError as error:
            reason = dict(call.trailing_metadata() or ()).get("interlock-reason", "-")
            print(f"\n{error.code().name} {reason}: {error.details()}", file=sys.stderr)
            return 1
    print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("token")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--deadline", type=float, default=240)
    parser.add_argument("--cancel-after", type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main())
