"""The model is replaced under load: nothing fails, and no answer is of two revisions."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import rollouts as load
from tests.fixtures.mesh import MODEL, ROOT, Mesh, started
from tests.fixtures.rollout_load import STREAMS as CLIENTS
from tests.fixtures.rollout_load import asked_all_the_time
from tests.fixtures.rollout_sight import held, rollout, serving, states, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OTHER = "bf16-weights"
STREAMS = 8
# Room for the demo model in int8, which takes 330 MB, or in bfloat16; not for both, nor in single precision.
SMALL_BYTES = 400_000_000
# Restarts and preparations on a busy machine.
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def pair(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two workers, and a second revision: the same files with weights that are not quantized.

    Its workers get no memory for a revision whose name a test writes into `SHORT_FILE`.
    """
    environment = {
        "PYTHONPATH": str(ROOT / "tests" / "fakes" / "faults"),
        "SHORT_FILE": str(tmp_path_factory.mktemp("faults") / "short"),
    }
    with started(model_path, "--workers", "2", **environment) as mesh:
        pushed = mesh.run(
            "models", "push", str(model_path), "--revision", OTHER, "--quantization", "none", "--json"
        )
        assert pushed.returncode == 0, pushed.stderr
        assert json.loads(pushed.stdout)[0]["manifest"]["revision"] == OTHER
        yield mesh


def measured(mesh: Mesh, *, strategy: str, rollouts: int) -> dict[str, Any]:
    """What clients notice while the model is replaced again and again."""
    arguments = argparse.Namespace(
        revision=OTHER, rollouts=rollouts, streams=STREAMS, tokens=24, strategy=strategy, bake=1.0, steady=1.0
    )
    metadata = (("authorization", f"Bearer {mesh.token}"),)
    seen, changes, began_s = asyncio.run(load.measure(mesh.address, metadata, arguments))
    return load.summary(seen, changes, began_s, arguments)


@pytest.mark.parametrize("strategy", ["side-by-side", "swap"])
def test_rollouts_under_load_drop_nothing(pair: Mesh, strategy: str) -> None:
    """There and back; each answer is from exactly one revision, and both answered."""
    before = serving(pair)
    found = measured(pair, strategy=strategy, rollouts=2)
    assert found["rollouts"] == ["COMPLETED", "COMPLETED"], rollout(pair)["history"]
    assert found["failures"] == []
    assert found["answers_of_two_revisions"] == 0
    assert found["answers"] >= STREAMS
    assert serving(pair) == before


def test_a_killed_controller_goes_on_with_its_rollout(pair: Mesh) -> None:
    """SIGKILL right after it began; the restarted one brings it to its end, and one revision serves."""
    before = serving(pair)
    started_ = pair.run("rollouts", "start", MODEL, OTHER, "--bake", "1s", "--json")
    assert started_.returncode == 0, started_.stderr
    os.kill(pair.refresh()["controllers"][0]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while (way := states(pair))[-1:] != ["COMPLETED"]:
        assert time.monotonic() < deadline, way
        assert pair.ask("What is the capital of France?", max_tokens=8)
    assert serving(pair) == OTHER
    back = pair.run("rollouts", "start", MODEL, before, "--bake", "1s", "--watch")
    assert back.returncode == 0, back.stderr
    assert "COMPLETED" in back.stderr
    assert serving(pair) == before


def test_what_an_operator_is_told(pair: Mesh, model_path: Path) -> None:
    """Refusals say what to do; a revision in use cannot be deleted, one that nobody uses can."""
    unknown = pair.run("rollouts", "start", MODEL, "nope")
    assert unknown.returncode == 1
    assert "nope" in unknown.stderr
    again = pair.run("rollouts", "start", MODEL, serving(pair))
    assert (again.returncode, "serves already" in again.stderr) == (1, True)
    used = pair.run("models", "rm", f"{MODEL}@{serving(pair)}")
    assert (used.returncode, "serves" in used.stderr) == (1, True)
    pushed = pair.run("models", "push", str(model_path), "--revision", "unused", "--quantization", "nf4")
    assert pushed.returncode == 0, pushed.stderr
    gone = pair.run("models", "rm", f"{MODEL}@unused")
    assert gone.returncode == 0, gone.stderr
    assert "unused" not in pair.run("models", "revisions").stdout


def test_one_worker_with_memory_for_one_copy_swaps(model_path: Path) -> None:
    """`auto` takes swap: requests wait, none fails. What does not fit even alone is ABORTED, and says so."""
    with started(model_path, "--worker-memory-bytes", str(SMALL_BYTES)) as mesh:
        push(mesh, model_path, OTHER, "--quantization", "none", "--dtype", "bf16")
        found = measured(mesh, strategy="auto", rollouts=1)
        assert (found["rollouts"], found["failures"]) == (["COMPLETED"], []), rollout(mesh)["history"]
        assert serving(mesh) == OTHER
        assert rollout(mesh)["spec"]["strategy"] == "ROLLOUT_STRATEGY_SWAP"
        push(mesh, model_path, "too-large", "--quantization", "none", "--dtype", "fp32")
        for strategy in ("side-by-side", "swap"):
            assert "of memory; the worker may use 400 MB" in aborted(mesh, "too-large", strategy)


BAD = [
    ("nan", "swap", "not finite"),
    ("shape", "side-by-side", "not make the model that config.json describes"),
]
# `make soak` adds the other strategy of each.
if "INTERLOCK_SOAK_FACTOR" in os.environ:
    BAD += [
        ("nan", "side-by-side", "not finite"),
        ("shape", "swap", "not make the model that config.json describes"),
    ]


@pytest.mark.parametrize(("how", "strategy", "named"), BAD)
def test_a_revision_that_is_no_good_is_aborted_with_its_cause(
    pair: Mesh, model_path: Path, tmp_path: Path, how: str, strategy: str, named: str
) -> None:
    """Weights that are not finite, or not of the shape that the configuration says: no request fails."""
    revision = f"bad-{how}-{strategy}"
    push(pair, spoiled(model_path, tmp_path / how, how), revision)
    assert named in aborted(pair, revision, strategy)
    assert pair.run("models", "rm", f"{MODEL}@{revision}").returncode == 0


@pytest.mark.parametrize(
    ("how", "strategy", "named"),
    [
        ("flipped", "side-by-side", "model.safetensors: the content does not have the manifest's digest."),
        ("truncated", "swap", "model.safetensors: fewer bytes came than the manifest says."),
    ],
)
def test_a_revision_that_was_damaged_where_it_is_kept_is_aborted_with_its_cause(
    pair: Mesh, model_path: Path, how: str, strategy: str, named: str
) -> None:
    """After it was taken in: no worker gave anything up, and the cause says what to do."""
    revision = f"damaged-{how}"
    push(pair, model_path, revision, "--quantization", "none", "--dtype", "fp32")
    damage(pair.home, revision, how)
    cause = aborted(pair, revision, strategy)
    assert named in cause
    assert "delete the revision and push it again" in cause
    assert pair.run("models", "rm", f"{MODEL}@{revision}").returncode == 0


@pytest.mark.parametrize("strategy", ["side-by-side", "swap"])
def test_a_load_that_gets_no_memory_is_aborted_with_its_cause(pair: Mesh, strategy: str) -> None:
    """The allocator refuses; by swap a worker that gave the old revision up loads it again."""
    short = Path(pair.environment["SHORT_FILE"])
    short.write_text(OTHER)
    try:
        assert "not enough memory" in aborted(pair, OTHER, strategy)
    finally:
        short.unlink()


def push(mesh: Mesh, directory: Path, revision: str, *options: str) -> None:
    """Registers a revision."""
    pushed = mesh.run("models", "push", str(directory), "--revision", revision, *options)
    assert pushed.returncode == 0, pushed.stderr


def aborted(mesh: Mesh, revision: str, strategy: str) -> str:
    """The cause of a rollout that ends ABORTED under load: nothing fails, and the old one answers it all."""
    before = serving(mesh)
    # Whatever another test has rolled out and back is inside no worker any more: it would be ready at once.
    until(lambda: set().union(*held(mesh).values()) == {before}, PATIENCE_S)
    with asked_all_the_time(mesh) as replies:
        watched = mesh.run("rollouts", "start", MODEL, revision, "--strategy", strategy, "--watch")
    ended = rollout(mesh)
    assert (watched.returncode, ended["state"]) == (1, "ROLLOUT_STATE_ABORTED"), watched.stderr
    assert {(one.status, one.revision) for one in replies} == {(200, before)}
    assert len(replies) >= CLIENTS
    assert serving(mesh) == before
    return str(ended["history"][-1]["cause"])


def damage(home: Path, revision: str, how: str) -> None:
    """Spoils a revision's weights where the controller keeps them, and those of no other revision."""
    (weights,) = home.glob(f"**/revisions/{MODEL}/{revision}/model.safetensors")
    # Contents are shared by links: this revision gets its own.
    alone = weights.with_name("alone")
    shutil.copy(weights, alone)
    alone.replace(weights)
    with weights.open("r+b") as file:
        if how == "truncated":
            file.truncate(weights.stat().st_size - 1_000)
        else:
            file.seek(-1_000, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1_000, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))


def spoiled(model: Path, directory: Path, how: str) -> Path:
    """A copy of a model that no worker can serve."""
    shutil.copytree(model, directory)
    if how == "shape":
        config = directory / "config.json"
        fields = json.loads(config.read_text())
        config.write_text(json.dumps({**fields, "intermediate_size": fields["intermediate_size"] // 2}))
        return directory
    for path in directory.glob("*.safetensors"):
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size)).get("model.norm.weight")
            if found is not None:
                begin, end = found["data_offsets"]
                file.seek(8 + size + begin)
                file.write(b"\xff" * (end - begin))
    return directory
