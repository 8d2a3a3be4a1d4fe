"""The memory that a worker counts as free: what a made-up control group leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.adapters import process_memory

MB = 1 << 20


def group(
    root: Path, *, limit: str, current: int, inactive_file: int = 0, active_file: int = 0, told: bool = True
) -> Path:
    """A control group's files; the figures are in bytes, and pages of files are part of `current`."""
    (root / "memory.max").write_text(limit + "\n")
    (root / "memory.current").write_text(f"{current}\n")
    if told:
        (root / "memory.stat").write_text(
            f"anon {current - inactive_file - active_file}\nfile {inactive_file + active_file}\n"
            f"inactive_anon 7\ninactive_file {inactive_file}\nactive_file {active_file}\nunevictable 5\n"
        )
    return root


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory for the control group; the machine has 10,000 MB left, and 600 MB of files are mapped."""
    monkeypatch.setattr(process_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(process_memory, "_meminfo_available", lambda: 10_000 * MB)
    monkeypatch.setattr(process_memory, "_mapped_file_bytes", lambda: 600 * MB)
    return tmp_path


def test_what_was_downloaded_and_written_can_be_dropped(machine: Path) -> None:
    """A group at its limit has all that its files take but the weights, which are mapped."""
    group(machine, limit=str(2_000 * MB), current=2_000 * MB, inactive_file=900 * MB, active_file=500 * MB)
    assert process_memory.available_bytes() == (900 + 500 - 600) * MB


def test_mapped_files_are_counted_once(machine: Path) -> None:
    """They are in the group's use already."""
    group(machine, limit=str(2_000 * MB), current=1_000 * MB, active_file=600 * MB)
    assert process_memory.available_bytes() == 1_000 * MB


def test_mapped_files_of_another_group_take_nothing_from_this_one(machine: Path) -> None:
    """Whoever read them first has them."""
    group(machine, limit=str(2_000 * MB), current=1_500 * MB, active_file=100 * MB)
    assert process_memory.available_bytes() == 500 * MB


def test_a_group_that_tells_nothing_of_files(machine: Path) -> None:
    """Then none can be dropped; and a group above its limit has nothing left."""
    group(machine, limit=str(2_000 * MB), current=1_500 * MB, told=False)
    assert process_memory.available_bytes() == 500 * MB
    group(machine, limit=str(1_000 * MB), current=1_500 * MB, told=False)
    assert process_memory.available_bytes() == 0


def test_without_a_limit_the_machine_decides(machine: Path) -> None:
    """What is mapped is in its figure as if it were free; and where the group has more, too."""
    group(machine, limit="max", current=1_500 * MB)
    assert process_memory.available_bytes() == 9_400 * MB
    group(machine, limit=str(90_000 * MB), current=1_500 * MB)
    assert process_memory.available_bytes() == 9_400 * MB


@pytest.mark.usefixtures("machine")
def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the default; nothing below zero is ever told."""
    monkeypatch.setattr(process_memory, "_meminfo_available", lambda: None)
    assert process_memory.available_bytes() == process_memory.AVAILABLE_BYTES_DEFAULT
    monkeypatch.setattr(process_memory, "_meminfo_available", lambda: 100 * MB)
    assert process_memory.available_bytes() == 0


def test_a_limit_is_the_machine(machine: Path) -> None:
    """Two revisions that the machine has room for, and the group has not, do not fit beside each other."""
    whole = process_memory.machine_bytes()
    group(machine, limit="max", current=0)
    assert process_memory.machine_bytes() == whole
    group(machine, limit=str(64 * MB), current=0)
    assert process_memory.machine_bytes() == 64 * MB
    group(machine, limit=str(2 * whole), current=0)
    assert process_memory.machine_bytes() == whole
