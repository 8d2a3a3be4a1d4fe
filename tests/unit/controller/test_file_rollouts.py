"""Rollouts as files: what a crash, a damaged file or a controller that slept can do to them."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.common.errors import StoreUnavailable
from services.controller.adapters import file_rollouts
from services.controller.adapters.file_rollouts import FileRolloutRecords
from services.controller.core.ports import FenceStale
from services.controller.core.rollout_history import HISTORY_MAX
from services.controller.core.rollout_record import Rollout, Spec, State, create


def rollout(id_: str, made_ms: int = 0, model: str = "m") -> Rollout:
    """A rollout that has just been made."""
    return create(id_, Spec(model=model, revision="new"), "old", made_ms, "old")


async def test_records_outlive_their_controller(tmp_path: Path) -> None:
    """The next one reads what was saved, oldest first, and that of its model alone."""
    first = FileRolloutRecords(tmp_path)
    assert (await first.claim("m", 3)).fence == 3
    await first.claim("other", 3)
    for one in (rollout("b", 2), rollout("a", 1), rollout("c", 0, "other")):
        await first.save(one)
    await first.save(replace(rollout("a", 1), paused=True))
    claimed = await FileRolloutRecords(tmp_path).claim("m", 4)
    assert [one.id for one in claimed.rollouts] == ["a", "b"]
    assert claimed.rollouts[0].paused
    assert sorted(entry.name for entry in (tmp_path / "m").iterdir()) == ["4"]


async def test_a_claim_is_above_all_before_it(tmp_path: Path) -> None:
    """Also where the store has forgotten every number."""
    await FileRolloutRecords(tmp_path).claim("m", 7)
    assert (await FileRolloutRecords(tmp_path).claim("m", 1)).fence == 8


async def test_a_stale_controller_changes_nothing(tmp_path: Path) -> None:
    """It slept while another took over: its save is refused, and nobody ever reads it."""
    stale, leader = FileRolloutRecords(tmp_path), FileRolloutRecords(tmp_path)
    await stale.claim("m", 1)
    await stale.save(rollout("a"))
    await leader.claim("m", 2)
    with pytest.raises(FenceStale):
        await stale.save(replace(rollout("a"), paused=True))
    with pytest.raises(FenceStale):
        await stale.save(rollout("b"))
    found = (await FileRolloutRecords(tmp_path).claim("m", 3)).rollouts
    assert [(one.id, one.paused) for one in found] == [("a", False)]


async def test_a_save_in_the_moment_of_a_claim_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy was made, the old directory is still there: the write goes there, and is told to be stale."""
    stale, leader = FileRolloutRecords(tmp_path), FileRolloutRecords(tmp_path)
    await stale.claim("m", 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    await leader.claim("m", 2)
    with pytest.raises(FenceStale):
        await stale.save(rollout("a"))
    assert (await FileRolloutRecords(tmp_path).claim("m", 3)).rollouts == ()


async def test_one_number_is_claimed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that saw the same directory one fails."""
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(file_rollouts, "_numbers", lambda _: [])
    await FileRolloutRecords(tmp_path).claim("m", 5)
    with pytest.raises(FenceStale):
        await FileRolloutRecords(tmp_path).claim("m", 5)
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["5"]


async def test_many_claims_at_once_lose_nothing(tmp_path: Path) -> None:
    """Whoever reads while another removes what it read sees the whole of it all the same."""
    first = FileRolloutRecords(tmp_path)
    await first.claim("m", 1)
    for number in range(20):
        await first.save(rollout(f"r{number:02}", number))

    async def claim(fence: int) -> int:
        try:
            return len((await FileRolloutRecords(tmp_path).claim("m", fence)).rollouts)
        except FenceStale:
            return 20

    for turn in range(10):
        fences = range(10 + 10 * turn, 20 + 10 * turn)
        assert await asyncio.gather(*(claim(fence) for fence in fences)) == [20] * 10


async def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    """They are named in the log; the others are there."""
    first = FileRolloutRecords(tmp_path)
    await first.claim("m", 1)
    await first.save(rollout("good"))
    whole = json.loads((tmp_path / "m/1/good.json").read_text())
    (tmp_path / "m/1/half.json").write_text(json.dumps(whole)[:50])
    (tmp_path / "m/1/no_history.json").write_text(json.dumps({**whole, "history": []}))
    (tmp_path / "m/1/long.json").write_text(" " * file_rollouts.RECORD_BYTES_MAX + json.dumps(whole))
    (tmp_path / "m/1/cut.new").write_text("{")
    with capture_logs() as lines:
        claimed = await FileRolloutRecords(tmp_path).claim("m", 2)
    assert [one.id for one in claimed.rollouts] == ["good"]
    assert sorted(line["file"] for line in lines) == ["half.json", "long.json"]


async def test_what_cannot_be_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of a later version, or one that the disk refuses for a moment, is still there afterwards."""
    first = FileRolloutRecords(tmp_path)
    await first.claim("m", 1)
    await first.save(rollout("a"))
    later = json.loads((tmp_path / "m/1/a.json").read_text()) | {"id": "later", "state": "VALIDATING"}
    (tmp_path / "m/1/later.json").write_text(json.dumps(later))
    assert [one.id for one in (await FileRolloutRecords(tmp_path).claim("m", 2)).rollouts] == ["a"]
    assert json.loads((tmp_path / "m/2/later.json").read_text()) == later
    opened = Path.open

    def refused(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "a.json" and arguments[:1] == ("rb",):
            raise OSError(24, "Too many open files")
        return opened(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(StoreUnavailable, match="Too many open files"):
            await FileRolloutRecords(tmp_path).claim("m", 3)
    assert [one.id for one in (await FileRolloutRecords(tmp_path).claim("m", 3)).rollouts] == ["a"]


async def test_what_serves_is_kept_longer_than_what_failed(tmp_path: Path) -> None:
    """The last that was completed says what serves, however many were aborted since."""
    first = FileRolloutRecords(tmp_path)
    await first.claim("m", 1)
    await first.save(replace(rollout("done"), state=State.COMPLETED))
    for number in range(HISTORY_MAX + 5):
        await first.save(replace(rollout(f"r{number:03}", 1 + number), state=State.ABORTED))
    found = (await FileRolloutRecords(tmp_path).claim("m", 2)).rollouts
    assert [found[0].id, found[1].id, len(found)] == ["done", "r005", HISTORY_MAX + 1]


async def test_a_late_claim_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one claimed and saved between its copy and its name: its copy is old, whatever its number."""
    await FileRolloutRecords(tmp_path).claim("m", 50)
    late, other = FileRolloutRecords(tmp_path), FileRolloutRecords(tmp_path)
    rename = Path.rename

    def after_the_other(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        other._claim("m", 1)
        other._save(rollout("new"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", after_the_other)
    with pytest.raises(FenceStale):
        await late.claim("m", 60)
    assert [one.id for one in (await FileRolloutRecords(tmp_path).claim("m", 61)).rollouts] == ["new"]


async def test_a_claim_that_was_cut_leaves_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the new directory has its name: the old one is still the newest."""
    first = FileRolloutRecords(tmp_path)
    await first.claim("m", 1)
    await first.save(rollout("a"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_rollouts, "sync_directory", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await FileRolloutRecords(tmp_path).claim("m", 2)
    (tmp_path / "m/.claim-crashed").mkdir()
    assert [one.id for one in (await FileRolloutRecords(tmp_path).claim("m", 2)).rollouts] == ["a"]
