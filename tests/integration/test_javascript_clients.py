"""The vendors' own libraries for Node before a gateway, through a real Envoy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from interlock.v1 import gateway_service_pb2 as pb

from tests.fakes.scripted_worker import Script
from tests.fixtures.edge import ask
from tests.fixtures.gateway_world import MODEL, bearer, make_token
from tests.fixtures.javascript import EXAMPLES, ROOT, Node
from tests.fixtures.openai_world import CALL, WEATHER, World, openai_world

# The packages may have to be installed first.
pytestmark = pytest.mark.timeout(400)

TURNS = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": TURNS}
MESSAGE: dict[str, Any] = {**CHAT, "max_tokens": 100}
# What every page may send unasked.
SAFE = {"accept"}
SCHEMA = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}


class Clients:
    """A gateway without a worker behind Envoy, and a Node with both libraries before it."""

    def __init__(self, world: World, process: asyncio.subprocess.Process) -> None:
        self.gateway = world.gateway
        self._process = process
        asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
        _, headers, _ = ask(world.url.removeprefix("http://"), "OPTIONS", "/v1/messages", headers=asked)
        self._allowed = set(headers["access-control-allow-headers"].split(", "))

    async def ask(self, client: str, method: str, *args: Any) -> Any:
        """What a call came to: its `value`, the `chunks` of its stream, and the `error` that it raised.

        Whatever it sent is what a page may send, which a browser asks before.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"client": client, "method": method, "args": args}).encode() + b"\n"
        )
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        told = json.loads(line)
        assert set(told["sent"]) - SAFE <= self._allowed, set(told["sent"]) - self._allowed
        return told

    async def check_errors(
        self, client: str, method: str, asked: dict[str, Any], *, late: str, full: str
    ) -> None:
        """Each kind of refusal is the library's own exception for it; of two the vendors' names differ."""
        tokens = {
            "nonsense": "AuthenticationError",
            make_token("bob", "models:read"): "PermissionDeniedError",
        }
        kinds = [
            *((asked, {"authorization": f"Bearer {token}"}, kind) for token, kind in tokens.items()),
            ({**asked, "model": "nope"}, {}, "NotFoundError"),
            ({**asked, "temperature": -1}, {}, "BadRequestError"),
            (asked, {"x-interlock-deadline": "0.1"}, late),
        ]
        for fields, headers, kind in kinds:
            if headers.get("authorization"):
                headers["x-api-key"] = headers["authorization"].removeprefix("Bearer ")
            told = await self.ask(client, method, fields, {"headers": headers})
            assert told["error"]["name"] == kind, told
        waiting = self.gateway.call(pb.GenerateRequest(text="x"), metadata=bearer(subject="bob"))
        assert (await waiting.read()).HasField("queued")
        assert (await self.ask(client, method, asked))["error"]["name"] == full
        waiting.cancel()

    async def check_loss(self, client: str, method: str, asked: dict[str, Any]) -> None:
        """A worker lost in the middle of a stream, with no other one, makes the library throw."""
        worker = await self.gateway.add_worker("w2", Script(answer="x" * 50, die_at=10))
        asking = asyncio.create_task(self.ask(client, method, {**asked, "stream": True}))
        await worker.wait_until(lambda: worker.starts)
        self.gateway.queue.remove_worker(MODEL, "w2")
        told = await asking
        assert told["chunks"]
        assert told["error"]["name"].endswith("Error"), told


@pytest.fixture
async def clients(tmp_path: Path, node: Node) -> AsyncIterator[Clients]:
    """Both libraries in one process."""
    async with openai_world(tmp_path) as world:
        process = await asyncio.create_subprocess_exec(
            str(node.program),
            str(ROOT / "tests" / "fixtures" / "vendor_clients.mjs"),
            world.url,
            make_token(),
            cwd=EXAMPLES,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        yield Clients(world, process)
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 10)


async def test_openai(clients: Clients) -> None:
    """Errors, models, chat, streams with usage, stop, tools, a schema, responses, a lost worker."""
    create = "chat.completions.create"
    await clients.check_errors("openai", create, CHAT, late="InternalServerError", full="RateLimitError")
    worker = await clients.gateway.add_worker("w1", Script(answer="one two three"))
    listed = await clients.ask("openai", "models.list")
    assert [model["id"] for model in listed["value"]["data"]] == [MODEL]
    whole = (await clients.ask("openai", create, {**CHAT, "stop": ["three"]}))["value"]
    assert (whole["choices"][0]["message"]["content"], whole["choices"][0]["finish_reason"]) == (
        "one two ",
        "stop",
    )
    assert whole["usage"]["prompt_tokens"] == 8
    streamed = await clients.ask(
        "openai", create, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert "error" not in streamed
    *told, last = streamed["chunks"]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in told) == "one two three"
    assert last["usage"]["completion_tokens"] == 13
    made = await clients.ask("openai", "responses.create", {"model": MODEL, "input": "hi", "stream": True})
    assert made["chunks"][-1]["response"]["output"][0]["content"][0]["text"] == "one two three"
    worker.script = Script(answer=CALL)
    (choice,) = (await clients.ask("openai", create, {**CHAT, "tools": [WEATHER]}))["value"]["choices"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    worker.script = Script(answer='{"rain": true}')
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
    parsed = await clients.ask("openai", "chat.completions.parse", {**CHAT, "response_format": form})
    said = parsed["value"]["choices"][0]["message"]
    assert (json.loads(said["content"]), said["parsed"]) == ({"rain": True}, {"rain": True})
    assert "error" not in await clients.ask("openai", create, {**CHAT, "messages": [*TURNS, said, *TURNS]})
    clients.gateway.queue.remove_worker(MODEL, "w1")
    await clients.check_loss("openai", create, CHAT)


async def test_anthropic(clients: Clients) -> None:
    """Errors, models, messages, streams, stop, tools, a schema, the counting of tokens, a lost worker."""
    create = "messages.create"
    await clients.check_errors(
        "anthropic", create, MESSAGE, late="GatewayTimeoutError", full="OverloadedError"
    )
    worker = await clients.gateway.add_worker("w1", Script(answer="one two three"))
    listed = await clients.ask("anthropic", "models.list")
    assert [model["id"] for model in listed["value"]["data"]] == [MODEL]
    whole = (await clients.ask("anthropic", create, {**MESSAGE, "stop_sequences": ["three"]}))["value"]
    assert (whole["content"][0]["text"], whole["stop_sequence"]) == ("one two ", "three")
    counted = await clients.ask("anthropic", "messages.countTokens", CHAT)
    assert counted["value"]["input_tokens"] == whole["usage"]["input_tokens"] == 8
    streamed = await clients.ask("anthropic", create, {**MESSAGE, "stream": True})
    assert "error" not in streamed
    deltas = [one["delta"]["text"] for one in streamed["chunks"] if one["type"] == "content_block_delta"]
    assert ("".join(deltas), streamed["chunks"][-1]["type"]) == ("one two three", "message_stop")
    worker.script = Script(answer=CALL)
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    called = (await clients.ask("anthropic", create, {**MESSAGE, "tools": [tool]}))["value"]
    assert (called["content"][0]["input"], called["stop_reason"]) == ({"city": "Paris"}, "tool_use")
    worker.script = Script(answer='{"rain": true}')
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    parsed = await clients.ask("anthropic", create, {**MESSAGE, "output_config": form})
    assert json.loads(parsed["value"]["content"][0]["text"]) == {"rain": True}
    clients.gateway.queue.remove_worker(MODEL, "w1")
    await clients.check_loss("anthropic", create, MESSAGE)
