"""`interlock rollouts watch` over the death of the controller that it watches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import rollout_pb2

from services.cli import rollouts

Answer = Callable[[], AsyncIterator[pb.WatchRolloutResponse]]
PATIENCE_S = 0.4


def lost(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.aio.AioRpcError:
    """How a stream ends whose server is gone."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost")


async def watched(
    monkeypatch: pytest.MonkeyPatch,
    *answers: Answer,
    rollout_id: str | None = "r",
    unlisted: Sequence[grpc.StatusCode] = (),
) -> int:
    """Watches a mesh that answers so, one call after the other; returns how many changes were heard.

    Args:
        monkeypatch: Puts that mesh in the place of the real one.
        answers: How it answers who watches.
        rollout_id: What is watched; without it the newest.
        unlisted: How questions for a list end before one is answered.
    """
    left, failures = list(answers), list(unlisted)

    class Stub:
        def __init__(self, _: Any) -> None:
            pass

        def WatchRollout(self, *_: Any, **__: Any) -> AsyncIterator[pb.WatchRolloutResponse]:
            return left.pop(0)() if len(left) > 1 else left[0]()

        async def ListRollouts(self, *_: Any, **__: Any) -> pb.ListRolloutsResponse:
            if failures:
                raise lost(failures.pop(0))
            return pb.ListRolloutsResponse(rollouts=[rollout_pb2.Rollout(id="r")])

    @contextlib.asynccontextmanager
    async def entrance(*_: Any) -> AsyncIterator[tuple[None, tuple[()]]]:
        yield None, ()

    monkeypatch.setattr(rollouts, "ControllerServiceStub", Stub)
    monkeypatch.setattr(rollouts, "entrance", entrance)
    monkeypatch.setattr(rollouts, "find_door", lambda: None)
    monkeypatch.setattr(rollouts, "_PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(rollouts, "_RETRY_S", 0.02)
    return len([found async for found in rollouts._changes(rollout_id)])


async def well() -> AsyncIterator[pb.WatchRolloutResponse]:
    """A rollout to its end."""
    yield pb.WatchRolloutResponse(rollout=rollout_pb2.Rollout(id="r"))


async def quiet_then_lost() -> AsyncIterator[pb.WatchRolloutResponse]:
    """Nothing changes for longer than anybody would wait for a controller; then it dies."""
    yield pb.WatchRolloutResponse(rollout=rollout_pb2.Rollout(id="r"))
    await asyncio.sleep(2 * PATIENCE_S)
    raise lost()


async def gone() -> AsyncIterator[pb.WatchRolloutResponse]:
    """Nobody is there."""
    raise lost()
    yield pb.WatchRolloutResponse()


async def unknown() -> AsyncIterator[pb.WatchRolloutResponse]:
    """There is no such rollout."""
    raise lost(grpc.StatusCode.NOT_FOUND)
    yield pb.WatchRolloutResponse()


async def test_a_death_after_a_quiet_time_is_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience counts from the loss, and not from the last change."""
    assert await watched(monkeypatch, quiet_then_lost, gone, gone, well) == 2


@pytest.mark.parametrize("answer", [gone, unknown])
async def test_what_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    """After a while, or at once where waiting would not help."""
    with pytest.raises(grpc.aio.AioRpcError):
        await watched(monkeypatch, answer)


async def test_the_newest_is_asked_for_until_somebody_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One controller stands still and lets the time run out, its successor does not lead yet."""
    unlisted = [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE]
    assert await watched(monkeypatch, well, rollout_id=None, unlisted=unlisted) == 1
