"""The controller is killed in the middle of a rollout, or stops and another one takes over: nobody notices.

Each case is under load. Afterwards one revision serves everywhere, and every request was answered, by one of
the two revisions.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.mesh import MODEL, ROOT, Mesh, started
from tests.fixtures.rollout_load import asked_all_the_time
from tests.fixtures.rollout_sight import revisions, rollout, serving, states, until, whole

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OTHER = "bf16-weights"
FAULTS = ROOT / "tests" / "fakes" / "faults"
# From the restart of the controller until one revision serves everywhere; a rollout's own time is not in it.
CONVERGED_S = 15.0
# A preparation on a busy machine.
PATIENCE_S = 90.0
# A lease, the search for who has it, and the way of the members there.
TAKEOVER_S = 10.0
# Envoy waits up to 9 s for a sign of life on a connection; the rest is for a busy machine.
LOST_S = 15.0


@pytest.fixture(scope="module")
def kill_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names the point at which a controller is killed."""
    return tmp_path_factory.mktemp("kill") / "point"


@pytest.fixture(scope="module")
def pair(model_path: Path, kill_file: Path) -> Iterator[Mesh]:
    """Two workers, two controllers, and a second revision: the same files with weights of another form."""
    faults = {"KILL_FILE": str(kill_file), "PYTHONPATH": str(FAULTS)}
    with started(model_path, "--workers", "2", "--controllers", "2", **faults) as mesh:
        pushed = mesh.run("models", "push", str(model_path), "--revision", OTHER, "--quantization", "none")
        assert pushed.returncode == 0, pushed.stderr
        yield mesh


KILLS = [
    # point, what is asked of the rollout once it is there, how it ends
    ("after saved PREPARING", "", "COMPLETED"),
    ("after saved SWITCHING", "", "COMPLETED"),
    ("after routed", "", "COMPLETED"),
    ("after saved BAKING", "", "COMPLETED"),
    ("after saved COMPLETED", "", "COMPLETED"),
    ("after saved ROLLING_BACK", "rollback", "ROLLED_BACK"),
]
# `make soak` adds those between them.
if "INTERLOCK_SOAK_FACTOR" in os.environ:
    KILLS += [
        ("after saved PENDING", "", "COMPLETED"),
        ("before saved PREPARING", "", "COMPLETED"),
        ("before saved SWITCHING", "", "COMPLETED"),
        ("before routed", "", "COMPLETED"),
        ("before saved COMPLETED", "", "COMPLETED"),
        ("after retired", "", "COMPLETED"),
        ("after saved ABORTING", "cancel", "ABORTED"),
    ]


@pytest.mark.parametrize(("point", "told", "end"), KILLS)
def test_one_revision_serves_whenever_the_controller_dies(
    pair: Mesh, kill_file: Path, point: str, told: str, end: str
) -> None:
    """SIGKILL at one point of the rollout; its successor brings it to the end that it would have had."""
    until(lambda: whole(pair), PATIENCE_S)
    before = serving(pair)
    other = next(name for name in revisions(pair) if name != before)
    with asked_all_the_time(pair) as replies:
        kill_file.write_text(point)
        bake = "60s" if told == "rollback" else "1s"
        # Where the controller dies over the record, the caller hears nothing of it; it is made all the same.
        pair.run("rollouts", "start", MODEL, other, "--bake", bake)
        if told:
            wanted = "BAKING" if told == "rollback" else "PREPARING"
            until(lambda: states(pair)[-1:] == [wanted], PATIENCE_S)
            pair.run("rollouts", told)
        until(lambda: not kill_file.exists(), PATIENCE_S)
        until(lambda: states(pair)[-1:] == [end], PATIENCE_S)
        until(lambda: whole(pair), CONVERGED_S)
        asked_s = time.monotonic()
        until(lambda: replies[-1].asked_s > asked_s, PATIENCE_S)
    assert serving(pair) == (other if end == "COMPLETED" else before)
    assert [reply.status for reply in replies if reply.status != 200] == []
    assert {reply.revision for reply in replies} <= {before, other}
    assert {reply.revision for reply in replies if reply.asked_s > asked_s} == {serving(pair)}


def test_a_standby_takes_over_from_a_controller_that_stands_still(pair: Mesh) -> None:
    """SIGSTOP in the middle of a rollout: the other leads it to its end, the first one changes nothing."""
    until(lambda: whole(pair), PATIENCE_S)
    before = serving(pair)
    other = next(name for name in revisions(pair) if name != before)
    leader = leading(pair)
    with asked_all_the_time(pair) as replies, ThreadPoolExecutor(1) as pool:
        begun = pair.run("rollouts", "start", MODEL, other, "--bake", "3s", "--json")
        assert begun.returncode == 0, begun.stderr
        until(lambda: states(pair)[-1:] == ["BAKING"], PATIENCE_S)
        watching = pool.submit(pair.run, "rollouts", "watch", "--json")
        assert roles(pair) == {"leading", "standby"}
        os.kill(leader["pid"], signal.SIGSTOP)
        try:
            stopped_s = time.time()
            # Envoy holds the one that stands still for healthy yet; who reads is not left waiting for it.
            assert until(lambda: serving(pair) == other, LOST_S) < LOST_S
            until(lambda: leading(pair) != leader and len(attached(pair, leading(pair))) >= 3, PATIENCE_S)
            took_s = max(attached(pair, leading(pair))) - stopped_s
            until(lambda: states(pair)[-1:] == ["COMPLETED"], PATIENCE_S)
            until(lambda: whole(pair), CONVERGED_S)
        finally:
            os.kill(leader["pid"], signal.SIGCONT)
        # It wakes, is told, and stands by.
        until(lambda: "controller.standing_by" in lines_since(pair, leader["id"], "controller.deposed"), 15)
        assert whole(pair)
        # Whoever watches is not told of it.
        watched = watching.result(PATIENCE_S)
        assert (watched.returncode, "COMPLETED" in watched.stdout) == (0, True), watched.stderr
    print(f"taken over after {took_s:.1f} s")  # noqa: T201 - a figure for who reads the test's output
    assert took_s < 2 * TAKEOVER_S
    assert rollout(pair)["history"][-1]["state"] == "ROLLOUT_STATE_COMPLETED"
    assert serving(pair) == other
    assert [reply.status for reply in replies if reply.status != 200] == []
    assert {reply.revision for reply in replies} <= {before, other}


def leading(mesh: Mesh) -> dict[str, Any]:
    """The controller that leads, by the logs: it was elected with the highest number."""

    def fence(part: dict[str, Any]) -> int:
        lines = (mesh.home / "logs" / f"{part['id']}.log").read_text().splitlines()
        return max((json.loads(line)["fence"] for line in lines if '"controller.elected"' in line), default=0)

    parts: list[dict[str, Any]] = mesh.refresh()["controllers"]
    return max(parts, key=fence)


def roles(mesh: Mesh) -> set[str]:
    """What `interlock status` says of the controllers."""
    rows = json.loads(mesh.run("status", "--json").stdout)
    return {row["state"] for row in rows if row["kind"] == "controller"}


def attached(mesh: Mesh, controller: dict[str, Any]) -> list[float]:
    """When members attached to a controller since it was elected, in seconds since the epoch."""
    lines = lines_since(mesh, controller["id"], "controller.elected").splitlines()
    stamps = [json.loads(line)["timestamp"] for line in lines if '"member.attached"' in line]
    return [datetime.fromisoformat(stamp).timestamp() for stamp in stamps]


def lines_since(mesh: Mesh, part_id: str, event: str) -> str:
    """What a part logged after an event; empty before it."""
    return (mesh.home / "logs" / f"{part_id}.log").read_text().rpartition(f'"{event}"')[2]
