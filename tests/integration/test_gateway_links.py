"""A gateway with the controllers of two meshes: each hears of its own model and drops its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from interlock.v1 import controller_service_pb2 as pb
from interlock.v1 import gateway_service_pb2, gateway_service_pb2_grpc
from pydantic import SecretStr

from services.common.config import ConfigInvalid
from services.common.system_clock import SystemClock
from services.gateway import __main__ as gateway_main
from services.gateway.adapters import controller_link
from services.gateway.adapters.controller_link import ControllerLink, Membership
from services.gateway.adapters.memory_queue import MemoryJobQueue
from services.gateway.config import GatewayConfig
from services.gateway.core.catalog import Catalog
from services.gateway.core.queue_line import QueueWorker
from services.gateway.core.tallies import Tallies
from tests.fakes.gateway_logs import FakeLogs
from tests.fakes.scripted_controller import ScriptedController, manifest_of, scripted_controller
from tests.fakes.scripted_worker import MESH_TOKEN, scripted_worker
from tests.fixtures.gateway_world import SECRET, bearer, joined
from tests.fixtures.tiny_tokenizer import write_tokenizer
from tests.integration.test_gateway_process import script, wait_for

# Of the two models, which have revisions of the same name.
REVISION = "v1"


@dataclass
class Links:
    """Two links of one gateway, and whom they speak with."""

    catalog: Catalog
    tallies: Tallies
    own: ControllerLink
    other: ControllerLink
    large: ScriptedController
    small: ScriptedController


@asynccontextmanager
async def attached(tmp_path: Path, *, name: str = "small") -> AsyncIterator[Links]:
    """Both have been taken in, by the other mesh first, whose model has that name."""
    source = write_tokenizer(tmp_path / "source")
    large = manifest_of(source, model="large", revision=REVISION, local_path=str(source))
    large.fallback_model = "small"
    small = manifest_of(source, model=name, revision=REVISION, local_path=str(source))
    catalog, tallies = Catalog(), Tallies()
    async with AsyncExitStack() as exits:
        first, at = await exits.enter_async_context(scripted_controller(large, source))
        second, there = await exits.enter_async_context(scripted_controller(small, source))
        own, other = (
            ControllerLink(
                Membership("g", "i", "127.0.0.1:1", MESH_TOKEN, (address,), tmp_path / "cache"),
                catalog,
                tallies,
                secondary=secondary,
            )
            for address, secondary in ((at, False), (there, True))
        )
        if name == "small":
            tasks = [asyncio.create_task(other.run())]
            await second.wait_heard("activated")
            tasks.append(asyncio.create_task(own.run()))
            await first.wait_heard("activated")
        else:
            tasks = [asyncio.create_task(own.run())]
            await first.wait_heard("activated")
            tasks.append(asyncio.create_task(other.run()))
        yield Links(catalog, tallies, own, other, first, second)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def reports_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a second to hear a report."""
    monkeypatch.setattr(controller_link, "REPORT_S", 0.05)


async def test_the_own_mesh_has_the_default_model_and_says_what_stands_in_for_it(tmp_path: Path) -> None:
    """Though the other one was there first."""
    async with attached(tmp_path) as links:
        catalog = links.catalog
        assert (catalog.default, catalog.models) == ("large", ("large", "small"))
        found = catalog.fallback_of(catalog.find(None))
        assert found is not None
        assert (found.model, found.secondary) == ("small", True)


async def test_each_controller_hears_of_its_own_model(tmp_path: Path) -> None:
    """In reports, and in the hello of the next attachment."""
    async with attached(tmp_path) as links:
        links.tallies.count_finished("large", REVISION)
        links.tallies.count_failed("small", REVISION)
        assert (await links.large.wait_counted(1, 0)).model == "large"
        assert (await links.small.wait_counted(0, 1)).model == "small"
        for link, model in ((links.own, "large"), (links.other, "small")):
            hello = link.hello().hello
            assert [(one.model, one.revision) for one in hello.revisions] == [(model, REVISION)]
            assert hello.epoch == 1


@pytest.mark.parametrize("verb", ["abort", "retire", "retire of the other's"])
async def test_a_controller_drops_its_own_revisions_alone(tmp_path: Path, verb: str) -> None:
    """Their names may be equal; whoever names the other mesh's model means nothing here."""
    async with attached(tmp_path) as links:
        command = (
            pb.AttachResponse(abort=pb.Abort(revision=REVISION))
            if verb == "abort"
            else pb.AttachResponse(
                retire=pb.Retire(model="small" if verb == "retire" else "large", revision=REVISION)
            )
        )
        await links.small.commands.put(command)
        if verb == "abort":
            async with asyncio.timeout(5):
                while links.catalog.find_prepared("small", REVISION):  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.01)
        else:
            await links.small.wait_heard("retired")
        kept = ["large", "small"] if verb == "retire of the other's" else ["large"]
        assert sorted(entry.model for entry in links.catalog.prepared) == kept


async def test_another_mesh_cannot_take_the_name_of_the_own_model(tmp_path: Path) -> None:
    """Its controller is told so, and the own revision goes on serving."""
    async with attached(tmp_path, name="large") as links:
        failed = (await links.small.wait_heard("failed")).failed
        assert "for its own mesh" in failed.reason
        assert not links.catalog.find("large").secondary


async def test_the_settings_say_which_mesh_helps_out(tmp_path: Path) -> None:
    """As its settings say: the revision names the model that stands in, whose mesh is away at first."""
    source = write_tokenizer(tmp_path / "source")
    large = manifest_of(source, model="large", revision=REVISION, local_path=str(source))
    large.fallback_model = "small"
    small = manifest_of(source, model="small", revision=REVISION, local_path=str(source))
    announce, terminate, logs = tmp_path / "announce.json", asyncio.Event(), FakeLogs()
    queue = MemoryJobQueue(SystemClock(), write_tail=logs.write_tail)
    async with AsyncExitStack() as exits:
        own, at = await exits.enter_async_context(scripted_controller(large, source))
        other, there = await exits.enter_async_context(scripted_controller(small, source))
        worker = await exits.enter_async_context(scripted_worker("s1", script(source, "hello")))
        for model, name, address in (("large", "w1", "127.0.0.1:1"), ("small", "s1", worker.address)):
            queue.set_route(model, 1, {REVISION: 1})
            queue.set_worker(model, QueueWorker(name, address, 2, frozenset({REVISION})))
        await queue.list_open("large", "w1", None)
        settings = GatewayConfig(
            bind="127.0.0.1:0",
            announce_file=announce,
            controllers=(at,),
            fallback_controllers=("127.0.0.1:1", there),
            cache_dir=tmp_path / "cache",
            mesh_token=SecretStr(MESH_TOKEN),
            jwt_secret=SecretStr(SECRET),
            drain_grace_s=1.0,
            drain_notice_s=0.0,
        )
        task = asyncio.create_task(
            gateway_main.run(settings, queue=queue, logs_of=(logs, logs), wait=wait_for(terminate))
        )
        for controller in (own, other):
            await controller.wait_heard("activated")
        target = json.loads(announce.read_text())["address"]
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(target))
        stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_service_pb2.GenerateRequest(text="hello"), metadata=bearer())
        events = [event async for event in call]
        assert joined(events) == "hello"
        assert next(event.started.model for event in events if event.HasField("started")) == "small"
        terminate.set()
        await task


async def test_a_controller_is_of_one_mesh() -> None:
    """It would take a second link for the first one, which has attached again."""
    settings = GatewayConfig(
        bind="127.0.0.1:0",
        controllers=("127.0.0.1:1", "127.0.0.1:2"),
        fallback_controllers=("127.0.0.1:2",),
        mesh_token=SecretStr(MESH_TOKEN),
        jwt_secret=SecretStr(SECRET),
    )
    with pytest.raises(ConfigInvalid, match=r"127\.0\.0\.1:2 is one of this mesh's"):
        await gateway_main.run(
            settings, queue=MemoryJobQueue(SystemClock()), logs_of=(FakeLogs(), FakeLogs())
        )
