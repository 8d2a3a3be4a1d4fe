"""The threads that a worker computes with: found out before torch is there, which binds who imports it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.worker.adapters import library_environment

# As a worker does: in a thread that is not the first one.
PROGRAM = """
import os, threading
from services.worker.__main__ import torch_compute
from services.worker.config import WorkerConfig

def compute():
    before = os.sched_getaffinity(0)
    made = torch_compute(WorkerConfig(mesh_token="m" * 32, controllers=["127.0.0.1:1"]))
    assert os.sched_getaffinity(0) == before, "left on one core"
    print("threads", made.loader._settings.threads)

thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


def test_a_worker_computes_on_every_core_that_it_may_use() -> None:
    """However the library binds threads to them."""
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, timeout=50
    )
    cores = min(len(os.sched_getaffinity(0)), library_environment._quota(library_environment.CPU_MAX))
    assert told.stdout.split()[-2:] == ["threads", str(cores)]


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 1 << 20), ("150000 100000", 1), ("50000 100000", 1), ("800000 100000", 8), ("", 1 << 20)],
)
def test_a_container_s_limit_counts_in_whole_cores(tmp_path: Path, limit: str, cores: int) -> None:
    """At least one; no limit where none is told."""
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    assert library_environment._quota(file) == cores
    assert library_environment._quota(tmp_path / "absent") == 1 << 20
