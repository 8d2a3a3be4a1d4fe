"""The checks of `make lint types` fail when what they guard is broken.

Each test breaks one rule in a copy of the tree and runs the check on it, so that a check which passes
because it looks at nothing is found out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PARTS = (
    "services",
    "protos",
    "deploy",
    "pyproject.toml",
    "buf.yaml",
    "README.md",
    "LICENSE",
    "constraints.txt",
    "Makefile",
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the checks look at."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tmp_path / part, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / part)
    return tmp_path


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of this environment inside the copy, which is found before the installed tree."""
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": f"{tree}:{tree / 'protos'}"},
    )


def append(file: Path, line: str) -> None:
    """Adds a line at the end of a file."""
    file.write_text(f"{file.read_text()}\n{line}\n")


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("gateway/core/jobs.py", "import time", "Cores are pure"),
        ("worker/core/scheduler.py", "import torch", "Cores are pure"),
        ("controller/core/ports.py", "from interlock.v1 import model_pb2", "Cores are pure"),
        (
            "gateway/dispatcher/dispatch.py",
            "from services.gateway.adapters import redis_queue",
            "layers of the gateway",
        ),
        ("worker/engine/engine.py", "import services.worker.servicer", "layers of the worker"),
        ("controller/coordinator/coordinator.py", "import grpc", "Orchestrators know ports"),
        ("gateway/servicer.py", "import services.worker.engine", "never import one another"),
        ("common/errors.py", "import services.gateway.config", "knows no service"),
        ("worker/servicer.py", "import redis", "Only gateway and controller"),
        ("gateway/servicer.py", "import torch", "Only workers compute"),
    ],
)
def test_import_linter_sees_each_breach_of_the_walls(tree: Path, file: str, line: str, broken: str) -> None:
    """One forbidden import each; the broken contract is named."""
    append(tree / "services" / file, line)
    done = run(tree, "lint-imports", "--no-cache")
    assert done.returncode == 1, done.stdout + done.stderr
    report = done.stdout[: done.stdout.index("Broken contracts")]
    assert any(broken in told and "BROKEN" in told for told in _joined(report)), report


def test_import_linter_wants_every_module_in_a_layer(tree: Path) -> None:
    """A new file beside the layers has no place until somebody gives it one."""
    (tree / "services" / "worker" / "stray.py").write_text('"""Nowhere."""\n')
    assert run(tree, "lint-imports", "--no-cache").returncode == 1


def test_the_tree_as_it_is_keeps_the_walls(tree: Path) -> None:
    """The copy without a breach passes: the failures above come from the breaches."""
    done = run(tree, "lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout


def test_ruff_and_mypy_see_a_breach(tree: Path) -> None:
    """An unused import and a wrong type, in code that is otherwise clean."""
    append(tree / "services" / "common" / "clock.py", "WRONG: int = 'text'\nimport os")
    assert run(tree, "ruff", "check", "services/common/clock.py").returncode == 1
    done = run(tree, "mypy", "services/common/clock.py")
    assert "clock.py" in done.stdout
    assert done.returncode == 1


def test_a_stale_envoy_configuration_is_seen(tree: Path) -> None:
    """The committed file must be what the generator makes."""
    command = ("python", "deploy/envoy/generate.py", "--check")
    assert run(tree, *command).returncode == 0
    append(tree / "deploy" / "envoy" / "envoy.yaml", "# edited by hand")
    assert run(tree, *command).returncode == 1


def test_buf_and_the_stub_check_see_a_breach(tree: Path) -> None:
    """A field without a comment and a stub that was not regenerated."""
    venv = ROOT / ".venv-protos" / "bin"
    if not (venv / "python").exists():
        pytest.skip("the environment of `make protos` is not there; `make lint` creates it")

    def generate(*arguments: str) -> int:
        return subprocess.run(
            [str(venv / "python"), "protos/generate.py", *arguments],
            cwd=tree,
            check=False,
            capture_output=True,
            timeout=120,
            env={"PATH": f"{venv}:/usr/bin:/bin"},
        ).returncode

    assert generate("--check") == 0
    proto = tree / "protos" / "interlock" / "v1" / "model.proto"
    append(proto, "message uncommented { string Field = 1; }")
    assert generate("--check") == 1
    assert generate("--image", "image.binpb") == 0
    done = run(tree, "buf", "lint", "image.binpb", "--config", "buf.yaml")
    assert done.returncode != 0
    assert "uncommented" in done.stdout


def _joined(report: str) -> list[str]:
    """The report with its wrapped lines joined: one entry a contract."""
    entries: list[str] = []
    for line in report.splitlines():
        if (
            line.rstrip().endswith(("KEPT", "BROKEN"))
            and entries
            and not entries[-1].endswith(("KEPT", "BROKEN"))
        ):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return entries
