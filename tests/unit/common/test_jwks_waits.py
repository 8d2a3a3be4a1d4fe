"""Who waits for a look at published keys, and for how long: any call may name a key that nobody knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from services.common import jwks
from services.common.trust import NewKeys
from tests.fakes.key_sources import FakeSource, Following, SlowSource
from tests.fixtures.token_forge import key_set, signer, signing_key

FIRST, SECOND = signing_key("EdDSA", 0), signing_key("EdDSA", 1)
SECOND_ID = SECOND.jwk["kid"]
# Far longer than what does not wait takes, and shorter than what does.
AT_ONCE_S = 10.0


@pytest.fixture
def source() -> SlowSource:
    """A source that hangs at its second look."""
    return SlowSource(key_set(FIRST), key_set(SECOND))


@pytest.fixture
async def following(source: SlowSource) -> AsyncIterator[Following]:
    """Who has read it once, and may look again."""
    found = Following(source)
    await found.follower.load()
    found.time_s = 10.0
    yield found
    source.answers_on.set()
    looks = [task for task in asyncio.all_tasks() if task.get_name() == "key-look"]
    if looks:
        await asyncio.wait(looks, timeout=AT_ONCE_S)


async def test_no_call_waits_for_a_look_that_hangs(
    source: SlowSource, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the one that made it nor one that came later; what is read after all is believed."""
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.05)
    async with asyncio.timeout(AT_ONCE_S):
        await following.follower.learn("invented")
        await following.follower.learn(SECOND_ID)
    assert not following.known(SECOND_ID)
    source.answers_on.set()
    async with asyncio.timeout(AT_ONCE_S):
        while not following.known(SECOND_ID):  # noqa: ASYNC110 - the keys tell nobody
            await asyncio.sleep(0.01)
    assert source.looks == 2


async def test_only_so_many_calls_wait(
    source: SlowSource, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is judged at once, by the keys that are known; when they have gone, calls wait again."""
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 60.0)
    waiting = [
        asyncio.create_task(following.follower.learn(f"invented-{number}"))
        for number in range(jwks.WAITING_MAX)
    ]
    await asyncio.to_thread(source.asked.wait, AT_ONCE_S)
    async with asyncio.timeout(AT_ONCE_S):
        await following.follower.learn("one more")
    assert not any(call.done() for call in waiting)
    source.answers_on.set()
    async with asyncio.timeout(AT_ONCE_S):
        await asyncio.gather(*waiting)
    following.time_s = 20.0
    await following.follower.learn("invented")
    assert source.looks == 3


async def test_a_look_that_took_long_is_not_followed_at_once_by_another(
    source: SlowSource, following: Following
) -> None:
    """The pause is what the issuer has between two looks, however long they take."""
    call = asyncio.create_task(following.follower.learn("invented"))
    await asyncio.to_thread(source.asked.wait, AT_ONCE_S)
    following.time_s = 25.0
    source.answers_on.set()
    await call
    for time_s, looks in ((34.0, 2), (35.0, 3)):
        following.time_s = time_s
        await following.follower.learn("invented")
        assert source.looks == looks


async def test_a_look_that_hangs_does_not_hold_up_the_end_of_the_process(
    source: SlowSource, following: Following
) -> None:
    """The pool of threads that asyncio keeps would be waited for."""
    call = asyncio.create_task(following.follower.learn("invented"))
    await asyncio.to_thread(source.asked.wait, AT_ONCE_S)
    assert source.is_left_behind
    source.answers_on.set()
    await call


@pytest.mark.parametrize(
    ("algorithm", "looks"),
    [("EdDSA", 2), ("none", 1), ("HS256", 1), ("eddsa", 1), (["EdDSA"], 1), (None, 1)],
    ids=str,
)
async def test_a_token_of_another_family_makes_nobody_look(algorithm: Any, looks: int) -> None:
    """It is refused whatever key it names, so its call does not wait."""
    source = FakeSource(key_set(FIRST))
    following = Following(source)
    await following.follower.load()
    following.time_s = 10.0
    token = signer("EdDSA").token({"kid": "invented", "alg": algorithm})

    async def go_on(_: Any) -> None:
        return None

    metadata = (("authorization", f"Bearer {token}"),)
    details = cast(grpc.HandlerCallDetails, SimpleNamespace(invocation_metadata=metadata))
    await NewKeys(following.follower, "EdDSA").intercept_service(go_on, details)
    assert source.looks == looks
