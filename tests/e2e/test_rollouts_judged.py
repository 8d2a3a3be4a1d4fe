"""A revision that turns bad after the switch goes back by itself: a real mesh whose workers fail on cue."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.mesh import MODEL, ROOT, Mesh, started
from tests.fixtures.rollout_load import asked_all_the_time
from tests.fixtures.rollout_sight import rollout

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OTHER = "bf16-weights"
FAULTS = ROOT / "tests" / "fakes" / "faults"
BAKE_S = 90.0
STREAMS = 4


def await_state(mesh: Mesh, state: str, timeout_s: float) -> dict[str, Any]:
    """The newest rollout, as soon as it is in a state."""
    deadline = time.monotonic() + timeout_s
    while not (found := rollout(mesh))["state"].endswith(f"_{state}"):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def test_a_revision_that_turns_bad_is_rolled_back(model_path: Path, tmp_path: Path) -> None:
    """Well within its time, and the history says why; from then on the old one answers, and nothing fails."""
    fault = tmp_path / "fault"
    environment = {"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(fault)}
    with started(model_path, "--workers", "2", **environment) as mesh:
        pushed = mesh.run("models", "push", str(model_path), "--revision", OTHER, "--quantization", "none")
        assert pushed.returncode == 0, pushed.stderr
        with asked_all_the_time(mesh) as replies:
            begun = mesh.run("rollouts", "start", MODEL, OTHER, "--bake", f"{BAKE_S:g}s", "--json")
            assert begun.returncode == 0, begun.stderr
            before = json.loads(begun.stdout)[0]["previous_revision"]
            await_state(mesh, "BAKING", 120)
            deadline = time.monotonic() + 30
            while not any(one.revision == OTHER for one in replies):
                assert time.monotonic() < deadline, replies[-5:]
                time.sleep(0.1)
            # It has been good; from here on it is not.
            fault.write_text(OTHER)
            turned_bad_s = time.monotonic()
            ended = await_state(mesh, "ROLLED_BACK", BAKE_S)
            assert time.monotonic() - turned_bad_s < BAKE_S / 2
            back_s = time.monotonic()
            while len(later := [one for one in replies if one.asked_s > back_s]) < 4 * STREAMS:
                assert time.monotonic() < back_s + 60, replies[-5:]
                time.sleep(0.1)
        # What was counted, or, where all its workers fell before a gateway told of it, that they did.
        cause = ended["history"][-2]["cause"]
        assert "failed" in cause or "No worker holds the new revision" in cause, ended
        assert {(one.status, one.revision) for one in later} == {(200, before)}
        told = mesh.run("rollouts", "list")
        assert "The old revision serves again." in told.stdout


def test_golden_prompts_are_answered_before_the_switch(model_path: Path, tmp_path: Path) -> None:
    """One that answers them serves; one that does not is ABORTED with the cause, and the old one goes on.

    One that forgets the answer while it is judged goes back by itself.
    """
    fault = tmp_path / "fault"
    environment = {"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(fault)}
    asked = {"text": "What is the capital of France?"}
    with started(model_path, **environment) as mesh:
        for revision, expected in (("knows", "Paris"), ("does-not", "Atlantis"), ("forgets", "Paris")):
            file = tmp_path / f"{revision}.json"
            # Equal manifests would be one revision.
            tokens = 13 if revision == "forgets" else 12
            file.write_text(json.dumps([{**asked, "expected": expected, "max_tokens": tokens}]))
            pushed = mesh.run(
                "models", "push", str(model_path), "--revision", revision, "--golden", str(file)
            )
            assert pushed.returncode == 0, pushed.stderr
        before = mesh.post("/v1/generate", {"text": "hi", "max_tokens": 2}).json["revision"]
        refused = mesh.run("rollouts", "start", MODEL, "does-not", "--watch", timeout_s=180)
        assert refused.returncode == 1
        ended = rollout(mesh)
        assert ended["state"] == "ROLLOUT_STATE_ABORTED"
        cause = ended["history"][-1]["cause"]
        assert "Golden prompt 1 of 1: its answer does not contain what it must." in cause
        assert mesh.post("/v1/generate", {"text": "hi", "max_tokens": 2}).json["revision"] == before
        taken = mesh.run("rollouts", "start", MODEL, "knows", "--bake", "1s", "--watch", timeout_s=180)
        assert taken.returncode == 0, taken.stderr
        assert mesh.post("/v1/generate", {"text": "hi", "max_tokens": 2}).json["revision"] == "knows"
        begun = mesh.run("rollouts", "start", MODEL, "forgets", "--bake", f"{BAKE_S:g}s", "--json")
        assert begun.returncode == 0, begun.stderr
        await_state(mesh, "BAKING", 120)
        fault.write_text("dull forgets")
        back = await_state(mesh, "ROLLED_BACK", BAKE_S)
        assert "Golden prompt 1 of 1: its answer does not contain" in back["history"][-2]["cause"], back
        assert mesh.post("/v1/generate", {"text": "hi", "max_tokens": 2}).json["revision"] == "knows"
