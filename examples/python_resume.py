"""Asks a mesh over gRPC and prints the answer as it comes, across lost connections.

python examples/python_resume.py HOST:PORT TOKEN "Tell me a story."
"""

from __future__ import annotations

import sys

import grpc
from interlock import resume
from interlock.v1.gateway_service_pb2 import GenerateRequest


def main() -> None:
    """Prints one answer."""
    address, token, prompt = sys.argv[1:]
    with grpc.insecure_channel(address) as channel:
        request = GenerateRequest(text=prompt, max_tokens=200)
        for event in resume.generate(channel, request, metadata=[("authorization", f"Bearer {token}")]):
            print(event.chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
