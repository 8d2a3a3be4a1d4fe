"""Workers and Redis are killed in the middle of a rollout: it ends as its table says, and no stream fails.

Each case is under a load of streams. Afterwards one revision is inside every worker, the restarted ones
included, and each of them answers with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.fixtures.mesh import MODEL, ROOT, Mesh, started
from tests.fixtures.rollout_sight import revisions, rollout, serving, states, until, whole
from tests.fixtures.rollout_streams import STREAMS, Stream, follow, streamed_all_the_time

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OTHER = "bf16-weights"
FAULTS = ROOT / "tests" / "fakes" / "faults"
# Restarts and preparations on a busy machine.
PATIENCE_S = 90.0
# From a rollout's end until one revision is everywhere; a worker may be on its way back, and loads it.
CONVERGED_S = 30.0
# From the death of Redis until a request that was asked since, and granted by the store, has its answer.
ANSWERED_S = 10.0
# From the moment that a gun has fired until all whom it was aimed at are seen to be dead; the next ones need
# seconds more.
DYING_S = 2.0
ENDS = {"COMPLETED", "ROLLED_BACK", "ABORTED"}
# Long enough for whoever is killed in the middle of it.
BAKE = "2s"


@dataclass(frozen=True, slots=True)
class Guns:
    """The files that name the points at which processes are killed; each is gone once it has fired.

    Attributes:
        worker: The point is a worker's phase and a revision.
        controller: The point is the controller's: around a record, or a write of the route.
    """

    worker: Path
    controller: Path

    def aim(self, mesh: Mesh, point: str, victims: str) -> None:
        """Arms the file to which a point belongs.

        Args:
            mesh: Where the victims are.
            point: The point.
            victims: `one`: the worker that comes to the point, or, for the controller's, the second one.
                `workers`: all of them. `redis`: the store.
        """
        state = mesh.refresh()
        pids = {
            "one": [state["workers"][1]["pid"]],
            "workers": [worker["pid"] for worker in state["workers"]],
            "redis": [state["redis"]["pid"]],
        }[victims]
        file = self.controller if point.startswith(("before", "after")) else self.worker
        named = pids if victims != "one" or file is self.controller else []
        file.write_text(f"{point}\n{' '.join(map(str, named))}")

    @property
    def fired(self) -> bool:
        """Whether it has happened."""
        return not self.worker.exists() and not self.controller.exists()


@pytest.fixture(scope="module")
def guns(tmp_path_factory: pytest.TempPathFactory) -> Guns:
    """Nothing is aimed at yet."""
    directory = tmp_path_factory.mktemp("kill")
    return Guns(directory / "worker", directory / "controller")


@pytest.fixture(scope="module")
def pair(model_path: Path, guns: Guns) -> Iterator[Mesh]:
    """Two workers, and a second revision: the same files with weights of another form."""
    environment = {
        "PYTHONPATH": str(FAULTS),
        "WORKER_KILL_FILE": str(guns.worker),
        "KILL_FILE": str(guns.controller),
        # How soon a process starts is the machine's affair.
        "INTERLOCK_GATEWAY_FAILOVER_WAIT_S": str(PATIENCE_S),
    }
    with started(model_path, "--workers", "2", **environment) as mesh:
        pushed = mesh.run("models", "push", str(model_path), "--revision", OTHER, "--quantization", "none")
        assert pushed.returncode == 0, pushed.stderr
        yield mesh


SIDE, SWAP = "side-by-side", "swap"

CASES = [
    # strategy, point (NEW and OLD stand for revisions), who is killed there, how the rollout ends
    (SIDE, "LOAD NEW", "one", "ABORTED"),
    (SIDE, "after saved BAKING", "workers", "COMPLETED"),
    (SIDE, "after saved BAKING", "redis", "COMPLETED"),
    (SWAP, "STAGED NEW", "one", "COMPLETED"),
]
# `make soak` adds those between them.
if "INTERLOCK_SOAK_FACTOR" in os.environ:
    CASES += [
        (SIDE, "FETCH NEW", "one", "COMPLETED"),
        (SIDE, "VERIFY NEW", "one", "COMPLETED"),
        (SIDE, "WARM NEW", "one", "ABORTED"),
        # Nobody was told that it is ready: it died where it loaded, as far as anybody knows.
        (SIDE, "READY NEW", "one", "ABORTED"),
        (SIDE, "before saved SWITCHING", "one", "COMPLETED"),
        (SIDE, "after saved SWITCHING", "one", "COMPLETED"),
        (SIDE, "after saved BAKING", "one", "COMPLETED"),
        (SIDE, "RETIRING OLD", "one", "COMPLETED"),
        (SIDE, "after saved PREPARING", "workers", "COMPLETED"),
        (SIDE, "LOAD NEW", "workers", "ABORTED"),
        (SIDE, "after saved SWITCHING", "workers", "COMPLETED"),
        (SIDE, "after saved PREPARING", "redis", "COMPLETED"),
        (SIDE, "LOAD NEW", "redis", "COMPLETED"),
        (SIDE, "after saved SWITCHING", "redis", "COMPLETED"),
        (SIDE, "after saved COMPLETED", "redis", "COMPLETED"),
        (SWAP, "FETCH NEW", "one", "COMPLETED"),
        (SWAP, "RETIRING OLD", "one", "COMPLETED"),
        (SWAP, "LOAD NEW", "one", "ABORTED"),
        (SWAP, "after saved BAKING", "one", "COMPLETED"),
        (SWAP, "STAGED NEW", "workers", "COMPLETED"),
        (SWAP, "RETIRING OLD", "redis", "COMPLETED"),
    ]


@pytest.mark.parametrize(("strategy", "point", "victims", "end"), CASES)
def test_a_rollout_survives_who_is_killed(
    pair: Mesh, guns: Guns, strategy: str, point: str, victims: str, end: str
) -> None:
    """SIGKILL at one point of it: its end is the table's, and no stream that had begun hears of it."""
    until(lambda: whole(pair), PATIENCE_S)
    before = serving(pair)
    new = next(name for name in revisions(pair) if name != before)
    with streamed_all_the_time(pair) as streams:
        guns.aim(pair, point.replace("NEW", new).replace("OLD", before), victims)
        begun = pair.run("rollouts", "start", MODEL, new, "--strategy", strategy, "--bake", BAKE)
        assert begun.returncode == 0, begun.stderr
        until(lambda: guns.fired, PATIENCE_S)
        killed_s = time.monotonic()
        if victims == "redis":
            # Without a gap by the gateway alone, and soon by the store again.
            until(lambda: any(not one.degraded for one in asked_since(streams, killed_s)), ANSWERED_S)
        until(lambda: states(pair)[-1:] in [[name] for name in ENDS], PATIENCE_S)
    until(lambda: whole(pair), CONVERGED_S)
    failed = [stream for stream in streams if stream.failure]
    if victims == "workers":
        failed = [stream for stream in failed if not died_with_both(stream, killed_s)]
    assert failed == []
    assert {frozenset(stream.revisions) for stream in streams if not stream.failure} <= {
        frozenset({before}),
        frozenset({new}),
    }
    assert states(pair)[-1] == end, rollout(pair)["history"]
    assert serving(pair) == (new if end == "COMPLETED" else before)
    assert answers_of_all(pair) == {(worker, serving(pair), False) for worker in ("worker-1", "worker-2")}


def died_with_both(stream: Stream, killed_s: float) -> bool:
    """Whether it was refused as one that kills workers, for both died as they began it.

    The kernel closes the connections of a killed process once its memory is cleared: of two that are killed
    at one instant one is seen to die some 0.1 s before the other, and a request that had just begun at it
    begins anew at the other. Nobody can tell that from a request that killed both.
    """
    quarantined = "crashed as they began this request" in stream.failure
    return quarantined and not stream.revisions and stream.asked_s < killed_s + DYING_S


def asked_since(streams: list[Stream], time_s: float) -> list[Stream]:
    """The streams that were asked since then, and have ended."""
    return [stream for stream in streams if stream.asked_s > time_s]


def answers_of_all(mesh: Mesh) -> set[tuple[str, str, bool]]:
    """Who answers what: worker, revision, and whether without the store; asked until both workers have."""
    answers: set[tuple[str, str, bool]] = set()

    def asked() -> bool:
        with ThreadPoolExecutor(STREAMS) as pool, grpc.insecure_channel(mesh.address) as channel:
            told = list(pool.map(lambda _: follow(mesh, channel, "Hello.", 2), range(STREAMS)))
        assert [stream for stream in told if stream.failure] == []
        answers.update((one.workers[-1], "".join(one.revisions), one.degraded) for one in told)
        return len({worker for worker, *_ in answers}) == 2

    until(asked, PATIENCE_S)
    return answers
