"""Who leads: the judgement of one controller, and two of them over one store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from services.common.errors import NotLeader, RolloutRefused, StoreUnavailable
from services.controller.coordinator import Coordinator, Leadership, Tenure, leadership
from services.controller.coordinator import tenure as tenure_module
from services.controller.core.catalog import Catalog, Manifest, Revision
from services.controller.core.election import Election
from services.controller.core.records import Claimed, Standing
from services.controller.core.rollout_events import Cancelled
from services.controller.core.rollout_record import Spec, State
from tests.fakes.controller_ports import (
    LEAD_TTL_S,
    TIMEOUT_S,
    FakeClock,
    MemoryLead,
    MemoryRolloutRecords,
    MemoryRouteStore,
)
from tests.fixtures.rollout_world import World


def test_a_first_look_may_found_and_replace() -> None:
    """A new mesh has no lease, and one of our own id is that of a process that is over."""
    fresh = Election(ttl_s=4.0)
    assert fresh.may_found(0.0)
    assert fresh.may_replace()


def test_an_earlier_process_is_replaced_once() -> None:
    """After the first answer a lease of our id is a later process's, or another one's: it is left alone."""
    assert not Election(ttl_s=4.0).after(Standing(0, "c"), 0.0).may_replace()
    assert not Election(ttl_s=4.0).after(Standing(3, "c"), 0.0).may_replace()


def test_a_lease_that_is_forgotten_is_waited_for() -> None:
    """Its owner founds it again within a second of the store's return; only when it has not, it is gone."""
    seen = Election(ttl_s=4.0).after(Standing(0, "other"), 10.0)
    assert not seen.may_found(100.0)
    vacant = seen.after(Standing(0, ""), 100.0)
    assert not vacant.may_found(103.9)
    assert vacant.after(Standing(0, ""), 102.0).may_found(104.0)
    assert not vacant.after(Standing(0, "other"), 102.0).may_found(200.0)


@dataclass
class OneTerm:
    """What exists while a controller leads."""

    coordinator: Coordinator
    closed: bool = False

    def close(self) -> None:
        """Remembers it."""
        self.closed = True


class Controller:
    """One controller's leadership over a store that it shares."""

    def __init__(self, name: str, store: MemoryRouteStore) -> None:
        self.clock = FakeClock()
        self.lead = MemoryLead(store, name)
        self.terms: list[OneTerm] = []
        self.told: list[bool] = []
        self.records = MemoryRolloutRecords()
        self._store = store
        self.leadership = Leadership(
            self.lead, self._begin, self.clock, ttl_s=LEAD_TTL_S, on_change=self._on_change
        )

    async def _begin(self, tenure: Tenure) -> OneTerm:
        catalog = Catalog()
        catalog.register(Revision(Manifest("m", "", (), "auto", "auto", 64, "").named(), "", 0.0))
        coordinator = Coordinator(
            catalog,
            self._store,
            self.records,
            self.clock,
            tenure,
            lease_ttl_s=5.0,
            prepare_timeout_s=600.0,
        )
        self.terms.append(OneTerm(coordinator))
        return self.terms[-1]

    async def _on_change(self, leading: bool) -> None:  # noqa: FBT001 - the port's form
        self.told.append(leading)


@contextlib.asynccontextmanager
async def running(*controllers: Controller) -> AsyncIterator[None]:
    """Lets them run until the block ends."""
    tasks = [asyncio.create_task(one.leadership.run()) for one in controllers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    """Returns when `holds`."""
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other at once."""
    monkeypatch.setattr(leadership, "LOOK_S", 0.01)
    monkeypatch.setattr(tenure_module, "RENEW_S", 0.05)


async def test_one_leads_and_the_other_says_so() -> None:
    """The standby names the leader and is not welcome; it has nothing that could act."""
    store = MemoryRouteStore()
    first, second = Controller("a", store), Controller("b", store)
    async with running(first):
        await until(lambda: first.told == [True])
        async with running(second):
            await until(lambda: "a leads" in refusal(second))
            assert second.terms == []
            assert first.leadership.term.coordinator.led.is_set()


async def test_the_standby_takes_over_when_the_leader_leaves() -> None:
    """The goodbye of a leader is the other's beginning; its number is higher."""
    store = MemoryRouteStore()
    first, second = Controller("a", store), Controller("b", store)
    async with running(first):
        await until(lambda: first.told == [True])
        fence = store.led_with
        async with running(second):
            await until(lambda: "a leads" in refusal(second))
            first.clock.seconds += 1
            store.leader = None
            second.lead.grant()
            await until(lambda: second.told == [True])
            assert store.led_with > fence
            # The first one learns of it by its next renewal, lets everybody go, and stands by.
            await until(lambda: first.told == [True, False])
            await until(lambda: "b leads" in refusal(first))


async def test_a_later_time_of_leading_begins_afresh() -> None:
    """Whoever leads again does not go on with what it knew before."""
    store = MemoryRouteStore()
    first, second = Controller("a", store), Controller("b", store)
    async with running(first):
        await until(lambda: first.told == [True])
        second.lead.grant()
        first.clock.seconds += 1
        await until(lambda: first.told == [True, False])
        await second.lead.leave()
        store.leader = second.lead
        first.lead.grant()
        await until(lambda: first.told == [True, False, True])
        old, new = first.terms
        assert old.coordinator.deposed.is_set()
        assert (old.closed, new.closed) == (True, False)
        assert not new.coordinator.deposed.is_set()
        assert first.leadership.term is new


async def test_the_lead_is_left_at_the_end() -> None:
    """A controller that shuts down does not let the next one wait for the end of its lease."""
    store = MemoryRouteStore()
    first = Controller("a", store)
    async with running(first):
        await until(lambda: first.told == [True])
    await first.leadership.leave()
    assert store.leader is None
    store.reachable = False
    await first.leadership.leave()


async def test_a_store_that_is_away_is_told() -> None:
    """Before the store ever answered nobody can say who leads."""
    store = MemoryRouteStore()
    store.reachable = False
    first = Controller("a", store)
    async with running(first):
        await until(lambda: store.calls > 2)
        with pytest.raises(StoreUnavailable):
            _ = first.leadership.term
        store.reachable = True
        await until(lambda: first.told == [True])


async def test_a_defect_ends_the_process() -> None:
    """What nobody foresaw is not taken for the end of a lease."""
    first = Controller("a", MemoryRouteStore())

    async def broken(tenure: Tenure) -> OneTerm:
        raise RuntimeError(tenure)

    first.leadership._begin = broken
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(first.leadership.run(), TIMEOUT_S)


async def test_a_leader_that_cannot_begin_lets_another_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk does not answer, or refuses: it gives the lead back, and sits out for a while."""
    monkeypatch.setattr(leadership, "BEGIN_S", 0.2)
    store = MemoryRouteStore()
    first, second = Controller("a", store), Controller("b", store)

    class NoRecords(MemoryRolloutRecords):
        async def claim(self, model: str, fence: int) -> Claimed:
            raise StoreUnavailable(f"The rollouts of {model} cannot be recorded with {fence}.")

    first.records = NoRecords()
    async with running(first):
        await until(lambda: len(first.terms) == 1)
        async with running(second):
            await until(lambda: second.told == [True])
            assert True not in first.told
            assert first.terms[0].closed


async def test_a_slow_beginning_does_not_cost_the_lead() -> None:
    """The lease is renewed while what exists in a time of leading is made."""
    first = Controller("a", MemoryRouteStore())
    kept: list[int] = []
    keep, begin = first.lead.keep, first.leadership._begin

    async def counted(fence: int) -> None:
        kept.append(fence)
        await keep(fence)

    async def slow(tenure: Tenure) -> OneTerm:
        await until(lambda: len(kept) >= 3)
        return await begin(tenure)

    first.lead.keep = counted  # type: ignore[method-assign]
    first.leadership._begin = slow
    async with running(first):
        await until(lambda: first.told == [True])
    assert kept[:3] == [1, 1, 1]


def refusal(controller: Controller) -> str:
    """Why it has no term; empty where it has one."""
    try:
        _ = controller.leadership.term
    except NotLeader as error:
        return error.message
    except StoreUnavailable:
        pass
    return ""


async def test_an_operator_is_told_that_another_controller_leads() -> None:
    """A command whose record is refused has no effect, and says whom to ask."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    spec = Spec(model="m", revision=world.new)
    world.records.taken_over = True
    with pytest.raises(NotLeader):
        await world.coordinator.start_rollout("r", spec)
    assert world.coordinator.deposed.is_set()
    assert world.coordinator.rollouts.all == ()


async def test_a_command_about_a_rollout_that_another_controller_leads() -> None:
    """The same for what is asked of a rollout."""
    world = World()
    await world.settle()
    world.attach("a")
    await world.settle()
    await world.start()
    world.records.taken_over = True
    with pytest.raises(NotLeader):
        await world.coordinator.tell_rollout(world.rollout.id, Cancelled())
    assert world.rollout.state is not State.ABORTED
    with pytest.raises((NotLeader, RolloutRefused)):
        await world.coordinator.tell_rollout(world.rollout.id, Cancelled())
