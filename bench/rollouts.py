"""Rollouts under a constant load: what clients notice.

    interlock up --workers 2                                        # in another terminal
    interlock models push MODEL_DIRECTORY --revision other --quantization none
    python -m bench.rollouts other [--rollouts 10] [--streams 16] [--strategy side-by-side]

    python -m bench.rollouts other --weights-of MODEL_DIRECTORY     # no push before: it makes other weights

Streams follow one another without a pause while rollouts lead from the revision that serves to the other one
and back. Prints one JSON object: requests, failures, answers by more than one revision, the time from the
request for a rollout to its switch and to its end, the longest pause between two events of any stream,
in steady load and within a second of a switch, and how long requests waited for their first text: by swap, a
lone worker's requests wait while it has neither revision. Ends with 1 where a request failed.

With `--weights-of` the other revision is made of a model directory by changing each weight by a little, and
pushed: nothing of the first one is shared then, neither files nor the quantized form, as with a new model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from interlock.v1 import controller_service_pb2 as controller_pb
from interlock.v1 import gateway_service_pb2 as pb
from interlock.v1 import gateway_service_pb2_grpc, rollout_pb2
from interlock.v1.controller_service_pb2_grpc import ControllerServiceStub
from rich.progress import track

PROMPT = "Write a very long story about traveller number {number}, with many chapters."

# An answer whose pause is counted as the switch's touches this much time around it.
AROUND_S = 1.0

# Digests and the upload of a few gigabytes on a busy disk.
PUSH_TIMEOUT_S = 1_800.0

# A worker that drains, unloads and loads on a busy laptop is done long before this.
ROLLOUT_TIMEOUT_S = 300.0

_STRATEGIES = {
    "auto": rollout_pb2.ROLLOUT_STRATEGY_AUTO,
    "side-by-side": rollout_pb2.ROLLOUT_STRATEGY_SIDE_BY_SIDE,
    "swap": rollout_pb2.ROLLOUT_STRATEGY_SWAP,
}

Metadata = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Seen:
    """What all clients saw.

    Attributes:
        answers: Requests that ended with an answer.
        failures: Why others did not.
        mixed: Answers of which two revisions had a part.
        revisions: Answers by revision.
        pauses: When a pause between two events of a stream ended, and how long it was, in seconds.
        waits: When a request's first text came, and how long after it was asked for, in seconds.
    """

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    mixed: int = 0
    revisions: dict[str, int] = field(default_factory=dict)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """One rollout: when it was asked for, switched and over, and how it ended."""

    asked_s: float
    switched_s: float
    ended_s: float
    state: str


async def stream(
    stub: gateway_service_pb2_grpc.GatewayServiceStub,
    metadata: Metadata,
    number: int,
    tokens: int,
    seen: Seen,
) -> None:
    """One request to its end."""
    request = pb.GenerateRequest(text=PROMPT.format(number=number), max_tokens=tokens, resumable=True)
    revisions: set[str] = set()
    current = ""
    began_s, last_s = time.perf_counter(), 0.0
    finished = False
    try:
        async for event in stub.Generate(request, metadata=metadata):
            now_s = time.perf_counter()
            if last_s:
                seen.pauses.append((now_s, now_s - last_s))
            elif event.HasField("chunk"):
                seen.waits.append((now_s, now_s - began_s))
            if event.HasField("started"):
                current = event.started.revision
            if event.HasField("chunk"):
                # A worker that is lost before it says anything has no part in the answer.
                revisions.add(current)
            # Waiting in the queue is no pause of a stream.
            last_s = now_s if event.HasField("chunk") else last_s
            finished = finished or event.HasField("finished")
    except grpc.aio.AioRpcError as error:
        seen.failures.append(f"{error.code().name}: {error.details()}")
        return
    if not finished:
        seen.failures.append("the stream ended without its end")
        return
    seen.answers += 1
    seen.mixed += len(revisions) > 1
    for revision in revisions:
        seen.revisions[revision] = seen.revisions.get(revision, 0) + 1


async def load(address: str, metadata: Metadata, streams: int, tokens: int, seen: Seen) -> None:
    """Keeps so many streams running until it is cancelled; those that run then are left alone."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)

        async def client(number: int) -> None:
            while True:
                await stream(stub, metadata, number, tokens, seen)

        await asyncio.gather(*(client(number) for number in range(streams)))


async def roll(stub: ControllerServiceStub, metadata: Metadata, spec: rollout_pb2.RolloutSpec) -> Change:
    """One rollout to its end."""
    asked_s, switched_s = time.perf_counter(), 0.0
    made = await stub.CreateRollout(controller_pb.CreateRolloutRequest(spec=spec), metadata=metadata)
    state = made.rollout.state
    request = controller_pb.WatchRolloutRequest(rollout_id=made.rollout.id)
    async for response in stub.WatchRollout(request, metadata=metadata, timeout=ROLLOUT_TIMEOUT_S):
        state = response.rollout.state
        if state == rollout_pb2.ROLLOUT_STATE_BAKING and not switched_s:
            switched_s = time.perf_counter()
    ended_s = time.perf_counter()
    name = rollout_pb2.RolloutState.Name(state).removeprefix("ROLLOUT_STATE_")
    return Change(asked_s, switched_s or ended_s, ended_s, name)


async def serving(stub: ControllerServiceStub, metadata: Metadata) -> tuple[str, str]:
    """The default model, and the revision that serves."""
    listed = await stub.ListModels(controller_pb.ControllerServiceListModelsRequest(), metadata=metadata)
    found = next(model for model in listed.models if model.is_default)
    return found.name, found.revision


async def measure(
    address: str, metadata: Metadata, arguments: argparse.Namespace
) -> tuple[Seen, list[Change], float]:
    """Load and rollouts; returns what was seen, the rollouts, and when they began."""
    seen, changes = Seen(), []
    loading = asyncio.create_task(load(address, metadata, arguments.streams, arguments.tokens, seen))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = ControllerServiceStub(channel)
        model, first = await serving(stub, metadata)
        await asyncio.sleep(arguments.steady)
        began_s = time.perf_counter()
        for number in track(range(arguments.rollouts), description="rolling"):
            spec = rollout_pb2.RolloutSpec(
                model=model,
                revision=first if number % 2 else arguments.revision,
                strategy=_STRATEGIES[arguments.strategy],
                # Revisions of different speed are replaced here on purpose.
                ttft_ratio_max=0,
            )
            spec.bake.FromMilliseconds(round(arguments.bake * 1000))
            changes.append(await roll(stub, metadata, spec))
    await asyncio.sleep(AROUND_S)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    return seen, changes, began_s


def summary(
    seen: Seen, changes: list[Change], began_s: float, arguments: argparse.Namespace
) -> dict[str, object]:
    """What is printed."""
    steady = [pause_s for at_s, pause_s in seen.pauses if at_s < began_s]
    switching = [
        pause_s
        for at_s, pause_s in seen.pauses
        if any(change.switched_s - AROUND_S <= at_s <= change.switched_s + AROUND_S for change in changes)
    ]
    rolling = [pause_s for at_s, pause_s in seen.pauses if at_s >= began_s]
    waited = {
        "steady": [wait_s for at_s, wait_s in seen.waits if at_s < began_s],
        "rolling": [wait_s for at_s, wait_s in seen.waits if at_s >= began_s],
    }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "strategy": arguments.strategy,
        "streams": arguments.streams,
        "rollouts": [change.state for change in changes],
        "answers": seen.answers,
        "failures": seen.failures,
        "answers_of_two_revisions": seen.mixed,
        "answers_by_revision": seen.revisions,
        "asked_to_switched_s": _spread([change.switched_s - change.asked_s for change in changes]),
        "asked_to_ended_s": _spread([change.ended_s - change.asked_s for change in changes]),
        "longest_pause_ms": {
            "steady": round(1000 * max(steady, default=0.0)),
            "around_a_switch": round(1000 * max(switching, default=0.0)),
            "at_any_time": round(1000 * max(rolling, default=0.0)),
        },
        "pause_p99_ms": {"steady": _p99_ms(steady), "around_a_switch": _p99_ms(switching)},
        "longest_wait_ms": {when: round(1000 * max(waits, default=0.0)) for when, waits in waited.items()},
    }


def push_other_weights(model: Path, revision: str) -> None:
    """Makes a model of other weights in a temporary directory and pushes it as a revision.

    Raises:
        SystemExit: It could not be pushed; the command has said why.
    """
    # It imports torch, which the other runs do without.
    from bench.other_weights import perturb  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="interlock-weights-") as place:
        directory = Path(place) / model.name
        perturb(model, directory)
        command = [sys.executable, "-m", "services.cli", "models", "push", str(directory)]
        pushed = subprocess.run(
            [*command, "--revision", revision], timeout=PUSH_TIMEOUT_S, check=False, stdout=subprocess.DEVNULL
        )
    if pushed.returncode:
        raise SystemExit(pushed.returncode)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "most": round(max(values), 2)}


def _p99_ms(values: Sequence[float]) -> int:
    ordered = sorted(values) or [0.0]
    return round(1000 * ordered[min(len(ordered) - 1, 99 * len(ordered) // 100)])


def main(argv: Sequence[str] | None = None) -> int:
    """Finds the mesh by its state file, measures and prints; 1 where a request failed or was dropped."""
    parser = argparse.ArgumentParser(prog="interlock bench rollouts", description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="the revision to roll to, and back from")
    parser.add_argument(
        "--weights-of",
        type=Path,
        metavar="DIRECTORY",
        help="make the revision of this model's weights, slightly changed, and push it first",
    )
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--streams", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--strategy", choices=tuple(_STRATEGIES), default="side-by-side")
    parser.add_argument("--bake", type=float, default=2.0, metavar="S", help="seconds of judgement")
    parser.add_argument("--steady", type=float, default=10.0, metavar="S", help="seconds of load before")
    arguments = parser.parse_args(argv)
    if arguments.weights_of is not None:
        push_other_weights(arguments.weights_of.resolve(), arguments.revision)
    home = Path(os.environ.get("INTERLOCK_HOME", ".interlock"))
    state = json.loads((home / "state.json").read_text())
    address = state["http"].removeprefix("http://").rstrip("/")
    metadata = (("authorization", f"Bearer {Path(state['token_file']).read_text().strip()}"),)
    seen, changes, began_s = asyncio.run(measure(address, metadata, arguments))
    print(json.dumps(summary(seen, changes, began_s, arguments), indent=2))
    ended_well = all(change.state == "COMPLETED" for change in changes)
    return 0 if ended_well and not seen.failures and not seen.mixed else 1


if __name__ == "__main__":
    raise SystemExit(main())
