"""Turns go round the tenants, and each tenant's own stand in line."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.turns import Turns


def full(*tenants: str) -> Turns[str]:
    """Turns that some tenants have, each of all but one of them at most."""
    turns = Turns[str](len(tenants), max(1, len(tenants) - 1))
    assert all(map(turns.take, tenants))
    assert not any(map(turns.take, (*tenants, "else")))
    return turns


def test_a_crowd_leaves_a_turn_to_others() -> None:
    """Its own stand in line beside a free one."""
    turns = Turns[str](4, 3)
    assert [turns.take("crowd") for _ in range(4)] == [True, True, True, False]
    turns.wait("crowd", "c0")
    assert [turns.take("alice"), turns.take("bob")] == [True, False]
    assert turns.give_back("alice") is None
    assert turns.take("alice")
    assert turns.give_back("crowd") == ("crowd", "c0")


def test_who_comes_late_passes_a_crowd() -> None:
    """The crowd's own go on in their order, between the turns of others."""
    turns = full("crowd", "crowd", "crowd", "carol")
    for number in range(12):
        turns.wait("crowd", f"c{number}")
    turns.wait("alice", "a0")
    turns.wait("bob", "b0")
    turns.wait("alice", "a1")
    given = [turns.give_back(tenant) for tenant in ("crowd", "crowd", "carol")]
    # By then each has one turn, and it is the crowd that has waited longest since its last.
    assert given == [("alice", "a0"), ("bob", "b0"), ("crowd", "c0")]
    assert [turns.give_back("alice"), turns.give_back("bob")] == [("alice", "a1"), ("crowd", "c1")]
    assert (turns.waiting, turns.waiting_of("crowd"), turns.waiting_of("alice")) == (10, 10, 0)


def test_two_crowds_have_half_of_the_turns_each() -> None:
    """Though the turns of one are short and those of the other are long."""
    turns = full("long", "long", "long", "short")
    for number in range(20):
        turns.wait("long", f"l{number}")
        turns.wait("short", f"s{number}")
    assert turns.give_back("long") == ("short", "s0")
    assert [turns.give_back("short") for _ in range(3)] == [("short", f"s{number}") for number in (1, 2, 3)]
    assert turns.give_back("long") == ("long", "l0")


def test_who_has_left_is_not_next() -> None:
    """Leaving twice, or after one's turn has come, changes nothing; with nobody left a turn is free."""
    turns = full("alice")
    for waiter in ("a", "b", "c"):
        turns.wait("alice", waiter)
    turns.leave("alice", "a")
    turns.leave("alice", "a")
    assert turns.give_back("alice") == ("alice", "b")
    turns.leave("alice", "b")
    turns.leave("alice", "c")
    assert (turns.waiting, turns.give_back("alice"), turns.take("bob")) == (0, None, True)


@given(
    st.sampled_from([(1, 1), (2, 1), (3, 2), (3, 3)]),
    st.lists(st.tuples(st.sampled_from(["ask", "leave", "end"]), st.sampled_from("abc")), max_size=60),
)
def test_nobody_waits_who_may_have_a_free_turn_and_the_poorest_is_next(
    bounds: tuple[int, int], happens: list[tuple[str, str]]
) -> None:
    """And each tenant's own come in their order."""
    turns, held = Turns[int](*bounds), Counter[str]()
    at_once, of_tenant = bounds
    lines: dict[str, list[int]] = {tenant: [] for tenant in "abc"}
    for number, (what, tenant) in enumerate(happens):
        if what == "ask" and turns.take(tenant):
            assert not lines[tenant]
            held[tenant] += 1
        elif what == "ask":
            turns.wait(tenant, number)
            lines[tenant].append(number)
        elif what == "leave" and lines[tenant]:
            turns.leave(tenant, lines[tenant].pop())
        elif what == "end" and held[tenant]:
            held[tenant] -= 1
            if (following := turns.give_back(tenant)) is not None:
                its, waiter = following
                assert held[its] == min(held[other] for other, line in lines.items() if line)
                assert waiter == lines[its].pop(0)
                held[its] += 1
        assert turns.waiting == sum(map(len, lines.values()))
        assert max(held.values(), default=0) <= of_tenant
        assert held.total() <= at_once
        if held.total() < at_once:
            assert all(held[tenant] == of_tenant for tenant, line in lines.items() if line)
