"""A thousand workers at one controller: how fast they attach, what a rollout over them costs, what it holds.

    interlock bench members [--workers 1000]

Starts a Redis and a controller, each its own process. The workers are simulated: each has a stream of its
own, reports its load every second, and does at once what it is told, so that the time measured is the
controller's. Prints one JSON object: seconds until all workers serve, until a rollout has switched everywhere
and has ended, and the controller's memory and processor time. Ends with 1 where a worker did not come to
serve the new revision.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import model_pb2, rollout_pb2, worker_pb2
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from rich.console import Console

from services.common.credential import mesh_metadata
from services.common.tokens import mint
from services.local import probes, redis_server
from tests.fixtures.tiny_tokenizer import write_tokenizer

MODEL, SECOND = "bench-members", "second"
MESH_TOKEN = "a-join-token-of-a-benchmark-on-loopback"  # noqa: S105 - it guards nothing and lives for seconds
JWT_SECRET = "a-jwt-secret-of-a-benchmark-on-loopback"  # noqa: S105 - likewise
REPORT_S = 1.0
# Streams that share a connection, as those of workers on different hosts would not.
STREAMS_PER_CHANNEL = 50
LIMIT_S = 120.0

_ENDED = {
    rollout_pb2.ROLLOUT_STATE_COMPLETED,
    rollout_pb2.ROLLOUT_STATE_ROLLED_BACK,
    rollout_pb2.ROLLOUT_STATE_ABORTED,
}


@dataclass(slots=True)
class Fleet:
    """What the workers know.

    Attributes:
        serving: The revisions that each serves: two while one takes the other's place.
        failures: Why streams ended.
    """

    serving: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failures: list[str] = field(default_factory=list)

    async def serve(self, workers: int, revision: str | None = None) -> None:
        """Returns when that many workers serve a revision, or any."""
        async with asyncio.timeout(LIMIT_S):
            while sum(revision in {None, *held} for held in self.serving.values() if held) < workers:
                if self.failures:
                    raise RuntimeError(f"a worker lost its stream: {self.failures[0]}")
                await asyncio.sleep(0.01)


async def worker(stub: ControllerServiceStub, name: str, fleet: Fleet) -> None:
    """One worker, until it is cancelled."""
    call = stub.Attach(metadata=mesh_metadata(MESH_TOKEN))
    device = worker_pb2.Device(kind="cpu", name="simulated", memory_bytes=1 << 40)
    hello = pb.Hello(
        kind=pb.MEMBER_KIND_WORKER,
        id=name,
        incarnation="1",
        address=f"{name}:1",
        slots=8,
        devices=[device],
    )
    try:
        await call.write(pb.AttachRequest(hello=hello))
        # A stream takes one message at a time.
        turn = asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            group.create_task(_report(call, turn))
            await _obey(call, turn, name, fleet)
            fleet.failures.append("the controller ended the stream")
    except* grpc.aio.AioRpcError as errors:
        fleet.failures.append(str(errors.exceptions[0])[:200])


async def _report(call: Any, turn: asyncio.Lock) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        async with turn:
            await call.write(pb.AttachRequest(load=worker_pb2.WorkerLoad(slots=8, memory_bytes=1 << 30)))


async def _obey(call: Any, turn: asyncio.Lock, name: str, fleet: Fleet) -> None:
    async for response in call:
        answer = pb.AttachRequest()
        match response.WhichOneof("command"):
            case "prepare" if response.prepare.stage_only:
                answer.staged.revision = response.prepare.manifest.revision
            case "prepare":
                answer.ready.revision = response.prepare.manifest.revision
                answer.ready.weights_bytes = 1 << 20
            case "activate":
                answer.activated.revision = response.activate.revision
                answer.activated.epoch = response.activate.epoch
                fleet.serving[name].add(response.activate.revision)
            case "retire":
                answer.retired.revision = response.retire.revision
                fleet.serving[name].discard(response.retire.revision)
            case _:
                continue
        async with turn:
            await call.write(answer)


def write_model(directory: Path) -> Path:
    """A model of one tensor, which nobody loads."""
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return directory


def manifest_of(directory: Path) -> model_pb2.Manifest:
    """The same files as another revision."""
    manifest = model_pb2.Manifest(
        model=MODEL, revision=SECOND, quantization=model_pb2.QUANTIZATION_INT8, context_tokens=64
    )
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        manifest.files.add(path=path.name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return manifest


@contextmanager
def process(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended at the end."""
    started = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        started.terminate()
        started.wait(30)


def announced(path: Path, of: subprocess.Popen[bytes]) -> str:
    """The address that a process announces."""
    deadline_s = time.monotonic() + LIMIT_S
    while not path.exists():
        if of.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError("the controller does not start")
        time.sleep(0.05)
    return str(json.loads(path.read_text())["address"])


def used(pid: int) -> tuple[float, float]:
    """A process's most memory in MB so far, and its processor time in seconds."""
    status = Path(f"/proc/{pid}/status").read_text()
    peak_kb = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return peak_kb / 1024, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def roll_out(
    stub: ControllerServiceStub, fleet: Fleet, workers: int, directory: Path
) -> dict[str, Any]:
    """Replaces the revision everywhere; returns what it took."""
    token = mint(JWT_SECRET, subject="bench", scopes=("admin",), ttl_s=3_600)
    metadata = (("authorization", f"Bearer {token}"),)
    upload = pb.UploadRevisionRequest(manifest=manifest_of(directory))
    await stub.UploadRevision(iter([upload]), metadata=metadata)
    spec = rollout_pb2.RolloutSpec(
        model=MODEL, revision=SECOND, strategy=rollout_pb2.ROLLOUT_STRATEGY_SIDE_BY_SIDE
    )
    spec.bake.FromMilliseconds(1)
    began = time.perf_counter()
    created = await stub.CreateRollout(pb.CreateRolloutRequest(spec=spec), metadata=metadata)
    await fleet.serve(workers, SECOND)
    switched_s = time.perf_counter() - began
    watch = stub.WatchRollout(pb.WatchRolloutRequest(rollout_id=created.rollout.id), metadata=metadata)
    state = rollout_pb2.ROLLOUT_STATE_UNSPECIFIED
    async for response in watch:
        state = response.rollout.state
        if state in _ENDED:
            break
    return {
        "switched_everywhere_s": round(switched_s, 2),
        "rollout_s": round(time.perf_counter() - began, 2),
        "state": rollout_pb2.RolloutState.Name(state),
    }


async def measure(workers: int) -> dict[str, Any]:
    """One run."""
    console = Console(stderr=True)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="il-")))
        socket, file = home / "redis.sock", home / "announce.json"
        stack.enter_context(process(redis_server.command(socket), {}))
        directory = write_model(home / "model")
        settings = {
            "BIND": "127.0.0.1:0",
            "ANNOUNCE_FILE": str(file),
            "REDIS_URL": redis_server.url(socket),
            "MESH_TOKEN": MESH_TOKEN,
            "JWT_SECRET": JWT_SECRET,
            "MODEL_PATH": str(directory),
            "MODEL_NAME": MODEL,
            "DATA_DIR": str(home / "data"),
            "LOG_LEVEL": "warning",
        }
        environment = {f"INTERLOCK_CONTROLLER_{name}": value for name, value in settings.items()}
        controller = stack.enter_context(process((sys.executable, "-m", "services.controller"), environment))
        with console.status("The controller starts"):
            address = await asyncio.to_thread(announced, file, controller)
            # It listens before it leads, and refuses whoever attaches meanwhile.
            await asyncio.wait_for(probes.until(lambda: probes.serving(address)), LIMIT_S)
        async with AsyncExitStack() as channels:
            stubs = [
                ControllerServiceStub(
                    await channels.enter_async_context(
                        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
                    )
                )
                for _ in range(0, workers, STREAMS_PER_CHANNEL)
            ]
            fleet = Fleet()
            began = time.perf_counter()
            tasks = [
                asyncio.create_task(worker(stubs[number // STREAMS_PER_CHANNEL], f"w{number}", fleet))
                for number in range(workers)
            ]
            try:
                with console.status(f"{workers} workers attach"):
                    await fleet.serve(workers)
                attached_s = time.perf_counter() - began
                with console.status("A rollout"):
                    rollout = await roll_out(stubs[0], fleet, workers, directory)
                await asyncio.sleep(5 * REPORT_S)
                steady_from_s = used(controller.pid)[1]
                with console.status("Steady load reports"):
                    await asyncio.sleep(10 * REPORT_S)
                peak_mb, cpu_s = used(controller.pid)
                served = sum(held == {SECOND} for held in fleet.serving.values())
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "workers": workers,
        "attached_s": round(attached_s, 2),
        **rollout,
        "serving_the_new_revision": served,
        "streams_lost": len(fleet.failures),
        "controller_peak_mb": round(peak_mb),
        "controller_cpu_share_steady": round((cpu_s - steady_from_s) / (10 * REPORT_S), 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and prints."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="interlock bench members",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=1_000, help="how many workers attach (1000)")
    figures = asyncio.run(measure(parser.parse_args(argv).workers))
    print(json.dumps(figures, indent=2))
    return 0 if figures["serving_the_new_revision"] == figures["workers"] else 1


if __name__ == "__main__":
    sys.exit(main())
