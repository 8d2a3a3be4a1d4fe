"""Rollouts that another machine must know of: what is at the artifacts' URL, and which record counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.controller.adapters import mirrored_rollouts
from services.controller.adapters.artifact_home import ArtifactHome
from services.controller.adapters.artifact_store import ArtifactStore
from services.controller.adapters.file_rollouts import FileRolloutRecords, encode
from services.controller.adapters.mirrored_rollouts import MirroredRolloutRecords
from services.controller.core.ports import FenceStale
from services.controller.core.records import Claimed
from services.controller.core.rollout_record import Rollout, Spec, State, Transition, create
from tests.fakes.faulty_store import Faults, FaultyFileSystem
from tests.fixtures.waiting import until

PLACE = "/bucket/m/rollouts"


def rollout(id_: str, made_ms: int = 0) -> Rollout:
    """A rollout that has just been made."""
    return create(id_, Spec(model="m", revision="new"), "old", made_ms, "old")


def entered(before: Rollout, state: State) -> Rollout:
    """The same rollout, a state later."""
    history = (*before.history, Transition(state, before.history[-1].time_ms + 1, "So."))
    return replace(before, state=state, history=history)


class Hosts:
    """Machines with a directory each; the one that claimed last leads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._leader: MirroredRolloutRecords | None = None
        self.made: list[MirroredRolloutRecords] = []

    async def claim(self, name: str, fence: int) -> tuple[MirroredRolloutRecords, Claimed]:
        """A controller on this machine takes the records over."""
        home = ArtifactHome(ArtifactStore("faulty://bucket", pauses_s=()), "m")

        async def confirm() -> None:
            if self._leader is not records:
                raise FenceStale

        records = MirroredRolloutRecords(FileRolloutRecords(self._directory / name), home, confirm)
        self.made.append(records)
        self._leader = records
        return records, await records.claim("m", fence)


@pytest.fixture
def hosts(tmp_path: Path, faults: Faults) -> Iterator[Hosts]:
    """No machine yet, and a home that somebody has entered."""
    put("/bucket/m/format.json", b'{"format": 1}')
    faults.calls.clear()
    found = Hosts(tmp_path)
    yield found
    faults.fail = lambda _call, _name: None
    for records in found.made:
        records.close()


def put(name: str, text: bytes) -> None:
    """Somebody else wrote this."""
    FaultyFileSystem().pipe_file(name, text)


def objects() -> list[str]:
    """What there is at the URL of rollouts."""
    return sorted(name.removeprefix(f"{PLACE}/") for name in FaultyFileSystem.store if name.startswith(PLACE))


def known(claimed: Claimed) -> list[tuple[str, State]]:
    """The rollouts of a claim, and where they are."""
    return [(one.id, one.state) for one in claimed.rollouts]


async def test_another_machine_goes_on_where_the_first_one_died(hosts: Hosts) -> None:
    """It has nothing, knows every rollout in its order, and leaves its own word under its own number."""
    first, _ = await hosts.claim("first", 3)
    ended = entered(rollout("done", 1), State.ABORTED)
    await first.save(ended)
    await first.save(rollout("live", 2))
    await first.save(entered(rollout("live", 2), State.PREPARING))
    second, claimed = await hosts.claim("second", 1)
    assert (claimed.fence, claimed.is_partial) == (4, False)
    assert known(claimed) == [("done", State.ABORTED), ("live", State.PREPARING)]
    await second.save(entered(claimed.rollouts[1], State.READY))
    await until(lambda: objects() == ["done.3.json", "live.4.json"])
    again = await FileRolloutRecords(hosts._directory / "second").claim("m", 9)
    assert known(again) == [("done", State.ABORTED), ("live", State.READY)]


async def test_what_a_later_leader_left_counts(hosts: Hosts) -> None:
    """A machine that comes back has older records of the same rollouts, and none of some."""
    first, _ = await hosts.claim("first", 1)
    await first.save(rollout("r", 1))
    second, _ = await hosts.claim("second", 2)
    await second.save(entered(rollout("r", 1), State.ABORTED))
    await second.save(rollout("s", 2))
    _, claimed = await hosts.claim("first", 3)
    assert known(claimed) == [("r", State.ABORTED), ("s", State.PENDING)]


async def test_what_this_machine_wrote_itself_counts_more_than_its_copy(hosts: Hosts, faults: Faults) -> None:
    """It died before the last step was copied; the next leader on it copies that."""
    first, _ = await hosts.claim("first", 1)
    await first.save(rollout("r"))
    faults.fail = refuse
    with capture_logs() as lines:
        saving = asyncio.create_task(first.save(entered(rollout("r"), State.PREPARING)))
        await until(lambda: [line["event"] for line in lines].count("rollouts.uncopied") == 1)
    saving.cancel()
    first.close()
    faults.fail = lambda _call, _name: None
    _, claimed = await hosts.claim("first", 2)
    assert known(claimed) == [("r", State.PREPARING)]
    await until(lambda: objects() == ["r.2.json"])
    assert json.loads(FaultyFileSystem().cat_file(f"{PLACE}/r.2.json"))["state"] == "PREPARING"


async def test_a_mesh_is_led_while_the_url_is_away(
    hosts: Hosts, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are recorded here and wait for no copy; the copies come when the URL is back."""
    monkeypatch.setattr(mirrored_rollouts, "COPY_PATIENCE_S", 0.01)
    monkeypatch.setattr(mirrored_rollouts, "RETRY_S", 0.01)
    faults.fail = refuse
    first, claimed = await hosts.claim("first", 1)
    assert (claimed.rollouts, claimed.is_partial) == ((), True)
    async with asyncio.timeout(5):
        await first.save(rollout("r"))
        await first.save(entered(rollout("r"), State.PREPARING))
    assert objects() == []
    faults.fail = lambda _call, _name: None
    await until(lambda: objects() == ["r.1.json"])
    assert json.loads(FaultyFileSystem().cat_file(f"{PLACE}/r.1.json"))["state"] == "PREPARING"


async def test_a_place_that_is_not_mounted_is_not_believed(hosts: Hosts) -> None:
    """It looks like one without records."""
    FaultyFileSystem.store.clear()
    _, claimed = await hosts.claim("first", 1)
    assert claimed.is_partial
    assert objects() == []


async def test_a_stale_controller_changes_nothing(hosts: Hosts) -> None:
    """It slept, and its directory is its own, so that nothing there tells it that another one leads."""
    stale, _ = await hosts.claim("first", 1)
    await stale.save(rollout("r"))
    leader, _ = await hosts.claim("second", 2)
    await leader.save(entered(rollout("r"), State.ABORTED))
    before = objects()
    with pytest.raises(FenceStale):
        await stale.save(entered(rollout("r"), State.PREPARING))
    assert objects() == before == ["r.2.json"]
    assert known((await hosts.claim("third", 3))[1]) == [("r", State.ABORTED)]


@pytest.mark.parametrize(
    "text", [b"{", encode(rollout("../../r")), encode(create("r", Spec(model="n", revision="x"), "y", 0))]
)
async def test_what_is_no_record_is_passed_over(hosts: Hosts, text: bytes) -> None:
    """Damaged, of another name, or of another model: the others are known nevertheless."""
    put(f"{PLACE}/r.1.json", text)
    put(f"{PLACE}/good.1.json", encode(rollout("good")))
    put(f"{PLACE}/notes.txt", b"An operator's.")
    _, claimed = await hosts.claim("first", 2)
    assert known(claimed) == [("good", State.PENDING)]
    await until(lambda: "good.2.json" in objects())
    assert "notes.txt" in objects()


async def test_what_went_on_elsewhere_counts_after_a_claim_that_could_not_look(
    hosts: Hosts, faults: Faults
) -> None:
    """The claim has a higher number than what the leader before left, and knows less all the same."""
    first, _ = await hosts.claim("first", 5)
    await first.save(entered(rollout("r", 1), State.PREPARING))
    second, claimed = await hosts.claim("second", 6)
    ended = replace(entered(claimed.rollouts[0], State.READY), state=State.ABORTED)
    await second.save(ended)
    await second.save(rollout("s", 2))
    faults.fail = refuse
    _, claimed = await hosts.claim("first", 7)
    assert (known(claimed), claimed.is_partial) == ([("r", State.PREPARING)], True)
    faults.fail = lambda _call, _name: None
    _, claimed = await hosts.claim("first", 8)
    assert known(claimed) == [("r", State.ABORTED), ("s", State.PENDING)]
    await until(lambda: objects() == ["r.6.json", "s.8.json"])


async def test_what_cannot_be_read_stays(hosts: Hosts) -> None:
    """A later version may have written it."""
    put(f"{PLACE}/later.1.json", b'{"state": "SOMETHING_NEW"}')
    put(f"{PLACE}/good.1.json", encode(rollout("good")))
    await hosts.claim("first", 2)
    await until(lambda: "good.2.json" in objects())
    assert "later.1.json" in objects()


async def test_old_ones_go(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asks for any more is forgotten there as it is here; the live one never is."""
    monkeypatch.setattr("services.controller.core.rollout_history.HISTORY_MAX", 1)
    put(f"{PLACE}/live.1.json", encode(rollout("live", 1)))
    for at in (2, 3):
        put(f"{PLACE}/o{at}.1.json", encode(entered(rollout(f"o{at}", at), State.ABORTED)))
    _, claimed = await hosts.claim("first", 2)
    assert [one.id for one in claimed.rollouts] == ["live", "o3"]
    await until(lambda: objects() == ["live.2.json", "o3.2.json"])


def refuse(_call: str, _name: str) -> None:
    """The URL is away."""
    raise ConnectionError("away")
