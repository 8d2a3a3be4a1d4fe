"""The processes beside a gateway in `bench.relay`: a source of tokens, and a relay that does nothing else.

    python -m bench.relay_peers source ANNOUNCE_FILE
    python -m bench.relay_peers relay ANNOUNCE_FILE SOURCE_ADDRESS

The source speaks `WorkerService` as a worker does, a message a step for all jobs of a session, and
`GatewayService.Generate` with a stream a request and a message a token, for the relay. Tokens come as fast as
the streams take them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from interlock.v1 import (
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    generation_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from services.common import announce, server
from services.common.channel import connect
from services.common.grpc_types import Context
from services.worker.servicer import COMMANDS_MAX

# Plain words of nearly every vocabulary; what they say does not matter.
TOKEN_FIRST, TOKEN_SPAN = 1_000, 64

LENGTH = generation_pb2.FINISH_REASON_LENGTH


@dataclass(slots=True)
class Job:
    """A sequence that is counted out."""

    name: str
    attempt: int
    tokens: int
    credit: int
    index: int = 0


class Source(worker_service_pb2_grpc.WorkerServiceServicer, gateway_service_pb2_grpc.GatewayServiceServicer):
    """Counts out tokens for both kinds of call."""

    async def Session(
        self, request_iterator: AsyncIterator[worker_service_pb2.SessionRequest], context: Context
    ) -> AsyncIterator[worker_service_pb2.SessionResponse]:
        """One token for each job that has credit in each message."""
        del context
        jobs: dict[str, Job] = {}
        wake = asyncio.Event()
        listening = asyncio.ensure_future(_listen(request_iterator, jobs, wake))
        # As a worker, so that the gateway speaks to it as to one.
        alive = worker_service_pb2.Alive(free_slots=1, commands_max=COMMANDS_MAX)
        try:
            yield worker_service_pb2.SessionResponse(alive=alive)
            while True:
                outputs = [_advance(job) for job in jobs.values() if job.credit]
                for output in outputs:
                    if output.finish:
                        del jobs[output.job]
                if outputs:
                    yield worker_service_pb2.SessionResponse(step=worker_service_pb2.Step(outputs=outputs))
                    continue
                wake.clear()
                # A sign of life keeps a session whose jobs all wait for credit.
                if not await _woken(wake):
                    yield worker_service_pb2.SessionResponse(alive=alive)
        finally:
            listening.cancel()

    async def Generate(
        self, request: gateway_service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[gateway_service_pb2.GenerateResponse]:
        """A message a token."""
        del context
        for index in range(request.max_tokens):
            chunk = generation_pb2.Chunk(
                index=index, text=" word", token_ids=[TOKEN_FIRST + index % TOKEN_SPAN]
            )
            yield gateway_service_pb2.GenerateResponse(cursor=index + 1, chunk=chunk)
        finished = generation_pb2.Finished(reason=LENGTH)
        yield gateway_service_pb2.GenerateResponse(cursor=request.max_tokens + 1, finished=finished)


class Relay(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Hands on what a call of its own receives: no identity, no queue, no text, no bounds."""

    def __init__(self, source: grpc.aio.Channel) -> None:
        self._stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(source)

    async def Generate(
        self, request: gateway_service_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[gateway_service_pb2.GenerateResponse]:
        """The source's stream."""
        del context
        async for response in self._stub.Generate(request):
            yield response


async def _listen(
    requests: AsyncIterator[worker_service_pb2.SessionRequest], jobs: dict[str, Job], wake: asyncio.Event
) -> None:
    async for request in requests:
        for one in request.commands.requests if request.HasField("commands") else (request,):
            _obey(one, jobs)
        wake.set()


def _obey(request: worker_service_pb2.SessionRequest, jobs: dict[str, Job]) -> None:
    match request.WhichOneof("command"):
        case "start":
            start = request.start
            jobs[start.job] = Job(start.job, start.attempt, start.max_tokens, start.credit_tokens)
        case "credit":
            if request.credit.job in jobs:
                jobs[request.credit.job].credit += request.credit.tokens
        case "cancel":
            jobs.pop(request.cancel.job, None)


def _advance(job: Job) -> worker_service_pb2.StepOutput:
    output = worker_service_pb2.StepOutput(
        job=job.name,
        attempt=job.attempt,
        index=job.index,
        token_ids=[TOKEN_FIRST + job.index % TOKEN_SPAN],
        finish=LENGTH if job.index + 1 == job.tokens else generation_pb2.FINISH_REASON_UNSPECIFIED,
    )
    job.index += 1
    job.credit -= 1
    return output


async def _woken(wake: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(1.0):
            await wake.wait()
    except TimeoutError:
        return False
    return True


async def serve(kind: str, announce_file: Path, source: str) -> None:
    """Serves until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    serving = grpc.aio.server(options=list(server.OPTIONS))
    if kind == "source":
        tokens = Source()  # type: ignore[abstract] # it plays two methods
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(tokens, serving)
        gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(tokens, serving)
    else:
        relay = Relay(connect(source))  # type: ignore[abstract] # it plays one method
        gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server(relay, serving)
    port = serving.add_insecure_port("127.0.0.1:0")
    await serving.start()
    announce.write(announce_file, id=kind, address=f"127.0.0.1:{port}")
    await stop.wait()
    await serving.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), "".join(sys.argv[3:])))
