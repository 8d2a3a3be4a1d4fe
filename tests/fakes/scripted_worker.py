"""A worker with a script: a real gRPC server that speaks `Session`, and does on cue what goes wrong in life.

It needs no model: its answer is a text, one token a character, so that a test knows what every continuation
must be. The sequences of a job take turns, a message each, and may have answers of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from interlock.v1 import generation_pb2, worker_service_pb2_grpc
from interlock.v1 import worker_service_pb2 as pb

from services.common.credential import check_mesh_token
from services.common.grpc_types import Context

MESH_TOKEN = "a-mesh-token-of-more-than-32-characters"
ALIVE_S = 0.2


@dataclass
class Script:
    """What the worker does; a test may change it at any time.

    Attributes:
        answer: The text that it generates; it ends with STOP after it.
        others: The texts of the second and further sequences; where there is none, it is `answer`.
        interval_s: Pause between two tokens.
        refusals: Reasons for which the next starts are refused, in order.
        die_at: Index before which the session is closed; None: never. It happens once.
        hang_at: Index before which it falls silent for good; None: never.
        batch: Tokens in one message.
        late_tokens: Tokens that it sends of an attempt that was cancelled.
        deaf: Cancellations are neither obeyed nor confirmed.
        message: The words of its refusals.
        scores: Whether it sends logprobs to those who ask for them.
        cached_prompt_tokens: What it tells with the first token of an answer.
        stall_at: Index before which its steps stand still while it goes on saying that it lives; None: never.
        failing: Every job is ended as failed before its first token.
        failures: So many of the next jobs are.
        opening: What the first token of an answer waits for; None: nothing.
        flaw_at: Index before which the first sequence of a job with a format cannot go on; None: never.
        commands_max: How many requests it takes in one message; 0: it ignores such, as workers before them.
        flaw: Why; where it is empty, as by workers that do not tell, the sequence just failed.
    """

    answer: str = "The answer is forty-two."
    interval_s: float = 0.0
    refusals: list[pb.RefusalReason.ValueType] = field(default_factory=list)
    die_at: int | None = None
    hang_at: int | None = None
    batch: int = 1
    late_tokens: int = 0
    deaf: bool = False
    message: str = ""
    scores: bool = True
    cached_prompt_tokens: int = 0
    stall_at: int | None = None
    failing: bool = False
    failures: int = 0
    opening: asyncio.Event | None = None
    flaw_at: int | None = None
    flaw: str = ""
    others: tuple[str, ...] = ()
    commands_max: int = 64

    def text_of(self, sequence: int) -> str:
        """What a sequence says."""
        return ((self.answer, *self.others)[sequence:] or (self.answer,))[0]


@dataclass
class Running:
    """A job that generates: its credit, and the index of the next token, of each sequence that goes on."""

    start: pb.StartJob
    credit: dict[int, int]
    index: dict[int, int]
    task: asyncio.Task[None] | None = None
    more: asyncio.Event = field(default_factory=asyncio.Event)


def logprob_of(token: int, alternatives: int) -> generation_pb2.TokenLogprob:
    """The score of a token: a function of its id, so that a test knows which entry belongs to which."""
    others = [
        generation_pb2.TokenAlternative(token_id=token + at, logprob=-token - at)
        for at in range(alternatives)
    ]
    return generation_pb2.TokenLogprob(logprob=-token, alternatives=others)


class ScriptedWorker(worker_service_pb2_grpc.WorkerServiceServicer):
    """Plays a worker.

    Attributes:
        worker_id: Its name.
        script: What it does.
        address: Where it listens.
        messages: How many requests there were in each message to it.
        starts: The orders that it got.
        starts_s: When each of them came, by the monotonic clock.
        cancelled: Jobs that it was told to end.
        shortened: Sequences of jobs that it was told to end alone.
        sent: Tokens sent for each job, by all attempts, of the longest sequence.
        running: Jobs that generate now.
        gateways: Who opened sessions.
        holds: How long it was asked to hold tokens back, in milliseconds; it does not.
    """

    def __init__(self, worker_id: str, script: Script | None = None) -> None:
        self.worker_id = worker_id
        self.script = script or Script()
        self.address = ""
        self.messages: list[int] = []
        self.starts: list[pb.StartJob] = []
        self.starts_s: list[float] = []
        self.cancelled: list[str] = []
        self.shortened: list[tuple[str, int]] = []
        self.sent: dict[str, int] = {}
        self.running: dict[str, Running] = {}
        self.gateways: list[str] = []
        self.holds: list[int] = []
        self.changed = asyncio.Condition()
        self._server: Any = None
        self._silent = False
        self._stalled = False

    async def wait_until(self, condition: Any) -> None:
        """Returns as soon as `condition()` holds; every message in or out is an occasion to look."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)

    async def start(self, address: str = "127.0.0.1:0") -> None:
        """Listens."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Dies: every session breaks."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """Its name."""
        del request, context
        return pb.GetStateResponse(worker_id=self.worker_id)

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionResponse]:
        """Plays the script for each job."""
        metadata = tuple(context.invocation_metadata() or ())
        check_mesh_token(metadata, MESH_TOKEN)
        self.gateways.append(str(dict(metadata)["x-interlock-gateway-id"]))
        outgoing: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._listen(request_iterator, outgoing)),
            asyncio.create_task(self._live(outgoing)),
        ]
        try:
            while (response := await outgoing.get()) is not None:
                yield response
        finally:
            jobs = [running.task for running in self.running.values() if running.task]
            self.running.clear()
            for task in (*tasks, *jobs):
                task.cancel()
            await asyncio.gather(*tasks, *jobs, return_exceptions=True)
            await self._notify()

    async def _listen(self, requests: AsyncIterator[pb.SessionRequest], outgoing: asyncio.Queue[Any]) -> None:
        async for request in requests:
            several = request.HasField("commands") and self.script.commands_max
            together = request.commands.requests if several else (request,)
            self.messages.append(len(together))
            for one in together:
                self._obey(one, outgoing)
            await self._notify()

    def _obey(self, request: pb.SessionRequest, outgoing: asyncio.Queue[Any]) -> None:
        match request.WhichOneof("command"):
            case "start":
                self._begin(request.start, outgoing)
            case "credit":
                if request.credit.job in self.running:
                    running = self.running[request.credit.job]
                    if request.credit.sequence in running.credit:
                        running.credit[request.credit.sequence] += request.credit.tokens
                    running.more.set()
            case "cancel" if request.cancel.HasField("sequence"):
                self._shorten(request.cancel.job, request.cancel.sequence, outgoing)
            case "cancel":
                self._cancel(request.cancel.job, outgoing)
            case "coalesce":
                self.holds.append(request.coalesce.hold_ms)

    async def _live(self, outgoing: asyncio.Queue[Any]) -> None:
        step = 0
        while True:
            step += 0 if self._stalled else 1
            if not self._silent:
                paused = sum(credit < 1 for job in self.running.values() for credit in job.credit.values())
                commands_max = self.script.commands_max
                alive = pb.Alive(step=step, free_slots=1, paused_jobs=paused, commands_max=commands_max)
                outgoing.put_nowait(pb.SessionResponse(alive=alive))
            await asyncio.sleep(ALIVE_S)

    def _begin(self, start: pb.StartJob, outgoing: asyncio.Queue[Any]) -> None:
        self.starts.append(start)
        self.starts_s.append(time.monotonic())
        if self.script.refusals:
            reason = self.script.refusals.pop(0)
            refused = pb.Refused(
                job=start.job, attempt=start.attempt, reason=reason, message=self.script.message
            )
            outgoing.put_nowait(pb.SessionResponse(refused=refused))
            return
        emitted = {one.sequence: one for one in start.emitted}
        going = [at for at in range(max(start.n, 1)) if at not in emitted or not emitted[at].ended]
        running = Running(
            start,
            dict.fromkeys(going, start.credit_tokens),
            {at: len(emitted[at].token_ids) if at in emitted else 0 for at in going},
        )
        if self.script.failing or self.script.failures > 0:
            self.script.failures = max(0, self.script.failures - 1)
            self._send(running, outgoing, going[0], 0, [], generation_pb2.FINISH_REASON_ERROR)
            return
        self.running[start.job] = running
        running.task = asyncio.create_task(self._generate(running, outgoing))

    def _cancel(self, job: str, outgoing: asyncio.Queue[Any]) -> None:
        self.cancelled.append(job)
        running = self.running.get(job)
        if running is None or self.script.deaf:
            return
        del self.running[job]
        assert running.task is not None
        running.task.cancel()
        for sequence, index in running.index.items():
            for late in range(self.script.late_tokens):
                self._send(running, outgoing, sequence, index + late, [ord("!")])
            self._send(running, outgoing, sequence, index, [], generation_pb2.FINISH_REASON_CANCELLED)

    def _shorten(self, job: str, sequence: int, outgoing: asyncio.Queue[Any]) -> None:
        self.shortened.append((job, sequence))
        running = self.running.get(job)
        if running is None or sequence not in running.index or self.script.deaf:
            return
        index = running.index.pop(sequence)
        del running.credit[sequence]
        running.more.set()
        self._send(running, outgoing, sequence, index, [], generation_pb2.FINISH_REASON_CANCELLED)

    async def _generate(self, running: Running, outgoing: asyncio.Queue[Any]) -> None:
        if self.script.opening is not None:
            await self.script.opening.wait()
        while running.index:
            for sequence in tuple(running.index):
                if not await self._trouble(max(running.index.values(), default=0), outgoing):
                    return
                await self._turn(running, sequence, outgoing)
            while running.index and not self._can_go_on(running):
                running.more.clear()
                await running.more.wait()
        self.running.pop(running.start.job, None)
        await self._notify()

    async def _trouble(self, index: int, outgoing: asyncio.Queue[Any]) -> bool:
        """Does what goes wrong before a token; returns whether anything follows."""
        script = self.script
        if script.die_at is not None and index >= script.die_at:
            script.die_at = None
            outgoing.put_nowait(None)
            return False
        if script.stall_at is not None and index >= script.stall_at:
            self._stalled = True
            await asyncio.Event().wait()
        if script.hang_at is not None and index >= script.hang_at:
            self._silent = True
            await asyncio.Event().wait()
        return True

    def _can_go_on(self, running: Running) -> bool:
        """Whether a sequence has credit, or is at its end."""
        return any(
            running.credit[sequence] > 0 or index >= self._end_of(running, sequence)
            for sequence, index in running.index.items()
        )

    def _end_of(self, running: Running, sequence: int) -> int:
        return min(len(self.script.text_of(sequence)), running.start.max_tokens)

    async def _turn(self, running: Running, sequence: int, outgoing: asyncio.Queue[Any]) -> None:
        """Sends some tokens of a sequence, or its end."""
        if sequence not in running.index:
            return
        text, index = self.script.text_of(sequence), running.index[sequence]
        flaw_at = self.script.flaw_at
        held = sequence == 0 and running.start.HasField("format")
        if held and flaw_at is not None and index >= flaw_at:
            self._give_up(running, sequence, outgoing)
            return
        end = self._end_of(running, sequence)
        size = max(0, min(self.script.batch, end - index, running.credit[sequence]))
        if size > 0:
            running.credit[sequence] -= size
            running.index[sequence] += size
            token_ids = [ord(character) for character in text[index : index + size]]
            self._send(running, outgoing, sequence, index, token_ids)
            await self._notify()
            await asyncio.sleep(self.script.interval_s)
        if index + size < end or running.index.pop(sequence, None) is None:
            return
        del running.credit[sequence]
        if not running.index:
            self.running.pop(running.start.job, None)
        stopped = end == len(text)
        reason = generation_pb2.FINISH_REASON_STOP if stopped else generation_pb2.FINISH_REASON_LENGTH
        self._send(running, outgoing, sequence, index + size, [], reason)
        await self._notify()

    def _give_up(self, running: Running, sequence: int, outgoing: asyncio.Queue[Any]) -> None:
        """Ends a sequence that cannot go on; the others do, until the gateway has heard of it."""
        index = running.index.pop(sequence)
        del running.credit[sequence]
        if not running.index:
            self.running.pop(running.start.job, None)
        error = generation_pb2.FINISH_REASON_ERROR
        self._send(running, outgoing, sequence, index, [], error, self.script.flaw)

    def _send(
        self,
        running: Running,
        outgoing: asyncio.Queue[Any],
        sequence: int,
        index: int,
        token_ids: list[int],
        finish: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED,
        flaw: str = "",
    ) -> None:
        start = running.start
        self.sent[start.job] = max(self.sent.get(start.job, 0), index + len(token_ids))
        scored = start.HasField("logprobs") and self.script.scores
        output = pb.StepOutput(
            job=start.job,
            attempt=start.attempt,
            sequence=sequence,
            index=index,
            token_ids=token_ids,
            finish=finish,
            flaw=flaw,
            logprobs=[logprob_of(token, start.logprobs) for token in token_ids] if scored else [],
            cached_prompt_tokens=0 if index or sequence else self.script.cached_prompt_tokens,
        )
        outgoing.put_nowait(pb.SessionResponse(step=pb.Step(outputs=[output])))

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


@asynccontextmanager
async def scripted_worker(worker_id: str, script: Script | None = None) -> AsyncIterator[ScriptedWorker]:
    """A worker that listens, and is gone afterwards."""
    worker = ScriptedWorker(worker_id, script)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
