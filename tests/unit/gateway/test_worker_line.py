"""What waits for the wire to a worker: how much of it travels together."""

from __future__ import annotations

import asyncio

import pytest
from interlock.v1 import worker_service_pb2 as pb

from services.common.channel import MESSAGE_BYTES_MAX
from services.gateway.adapters.worker_line import TOGETHER_BYTES_MAX, WorkerLine


class Stream:
    """Takes what is written, a loop's turn later."""

    def __init__(self) -> None:
        self.messages: list[pb.SessionRequest] = []

    async def write(self, message: pb.SessionRequest) -> None:
        """See `grpc.aio.StreamStreamCall.write`."""
        await asyncio.sleep(0)
        self.messages.append(message)


def start(job: str, prompt_tokens: int = 1) -> pb.SessionRequest:
    """An order; each of its prompt's tokens takes two bytes."""
    return pb.SessionRequest(start=pb.StartJob(job=job, prompt_ids=[1_000] * prompt_tokens))


async def written(line: WorkerLine) -> list[list[pb.SessionRequest]]:
    """The requests of each message, once nothing waits any more."""
    stream = Stream()
    writing = asyncio.ensure_future(line.write_to(stream))
    async with asyncio.timeout(5):
        while line._waiting:  # noqa: ASYNC110 - nobody but a test waits for that
            await asyncio.sleep(0)
    writing.cancel()
    return [list(one.commands.requests) if one.HasField("commands") else [one] for one in stream.messages]


@pytest.mark.parametrize(
    ("commands_max", "sizes"), [(0, [1] * 7), (1, [1] * 7), (3, [3, 3, 1]), (64, [7]), (2**32 - 1, [7])]
)
async def test_no_message_holds_more_than_the_worker_takes(commands_max: int, sizes: list[int]) -> None:
    """One that takes none gets each alone; all come in their order, each once."""
    line = WorkerLine(commands_max)
    requests = [start("a"), start("b")]
    requests += [pb.SessionRequest(credit=pb.AddCredit(job="a", tokens=tokens)) for tokens in (1, 2)]
    requests += [pb.SessionRequest(cancel=pb.CancelJob(job=job)) for job in "ba"]
    requests += [pb.SessionRequest(coalesce=pb.Coalesce(hold_ms=5))]
    for request in requests:
        line.put(request)
    messages = await written(line)
    assert [len(message) for message in messages] == sizes
    assert [request for message in messages for request in message] == requests


async def test_a_request_alone_is_not_wrapped() -> None:
    """Nothing is gained by it."""
    line, stream = WorkerLine(64), Stream()
    writing = asyncio.ensure_future(line.write_to(stream))
    for job in "ab":
        line.put(start(job))
        while line._waiting:  # noqa: ASYNC110 - nobody but a test waits for that
            await asyncio.sleep(0)
    writing.cancel()
    assert stream.messages == [start("a"), start("b")]


async def test_long_prompts_travel_alone() -> None:
    """A message stays far below what a peer reads, and each order keeps its place."""
    line = WorkerLine(64)
    long, part = TOGETHER_BYTES_MAX, TOGETHER_BYTES_MAX // 5
    for job, tokens in zip("abcdefghij", (1, 1, long, 1, part, part, part, 1, long, long), strict=True):
        line.put(start(job, tokens))
    messages = await written(line)
    jobs = ["".join(one.start.job for one in message) for message in messages]
    assert jobs == ["ab", "c", "def", "gh", "i", "j"]
    sizes = [sum(one.ByteSize() for one in message) for message in messages if len(message) > 1]
    assert max(sizes) <= TOGETHER_BYTES_MAX < MESSAGE_BYTES_MAX // 100
