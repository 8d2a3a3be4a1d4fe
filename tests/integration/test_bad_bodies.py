"""Bad input by HTTP through a real Envoy, one table over all APIs: each error has the shape of its API.

Nothing of the mesh and nothing of the request stands in an error or in the log, and the next request works.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio

from deploy.envoy.routes import BODY_BYTES_MAX
from services.gateway.http import native_fields
from tests.fakes.scripted_worker import Script
from tests.fixtures.any_call import check_at_once
from tests.fixtures.bad_bodies import ANSWER, APIS, PRIVATE, Api, World, check_next, message_of
from tests.fixtures.edge import ask
from tests.fixtures.gateway_edge import envoy_before
from tests.fixtures.gateway_world import SECRET, make_token, open_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One for all cases: what one of them breaks, the next one shows."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.setblocking(False)
        async with (
            open_gateway() as gateway,
            envoy_before(tmp_path_factory.mktemp("edge"), gateway.address) as url,
        ):
            await gateway.add_worker("w1", Script(answer=ANSWER))
            yield World(gateway, url.removeprefix("http://"), stranger)


@pytest.fixture(params=APIS, ids=lambda api: api.path)
def api(request: pytest.FixtureRequest) -> Api:
    """Each of the paths."""
    made: Api = request.param
    return made


@pytest.fixture(autouse=True)
def _nothing_private_in_the_log(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever is sent, the log has neither the prompt nor the token."""
    yield
    told = "".join(capfd.readouterr())
    for secret in (PRIVATE, make_token().rpartition(".")[0], SECRET):
        assert secret not in told


def with_more(api: Api, more: str) -> bytes:
    """The good body with something more in it, as JSON text."""
    return json.dumps(api.good).removesuffix("}").encode() + b", " + more.encode() + b"}"


# What no API takes, with what the message says of it.
BODIES: Mapping[str, tuple[Any, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "malformed": (b"{", "not JSON"),
    "cut": (lambda api: api.with_text(PRIVATE)[:-3], "not JSON"),
    "two objects": (lambda api: api.with_text(PRIVATE) * 2, "not JSON"),
    "an array": (b"[]", "not an object"),
    "a text": (b'"text"', "not an object"),
    "null": (b"null", "not an object"),
    "no UTF-8": (b'{"text": "\xff\xfe"}', "UTF-8"),
    "compressed": (lambda api: gzip.compress(api.with_text(PRIVATE)), "UTF-8"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, "nested"),
    "nested objects": (b'{"a":' * 100_000, "nested"),
    "nested and whole": (lambda api: with_more(api, f'"metadata": {"[" * 40 + "]" * 40}'), "nested"),
    "a key twice": (lambda api: with_more(api, '"model": "a", "model": "b"'), "given twice"),
    "a key twice within": (lambda api: with_more(api, '"metadata": {"a": 1, "a": 2}'), "given twice"),
    "NaN": (lambda api: with_more(api, '"temperature": NaN'), "NaN"),
    "infinity": (lambda api: with_more(api, '"temperature": -Infinity'), "Infinity"),
    "a number beyond double precision": (
        lambda api: with_more(api, '"metadata": {"a": 1e400}'),
        "metadata: ",
    ),
    "thousands of digits": (lambda api: with_more(api, f'"max_tokens": {"9" * 5_000}'), "not JSON"),
    "half a character": (lambda api: api.with_text("\\ud800"), "Unicode"),
    "half a character within": (lambda api: with_more(api, '"metadata": {"a": "\\ud800"}'), "metadata: "),
    "an unknown field": (lambda api: with_more(api, '"colour": "red"'), "colour"),
    "a field with controls": (lambda api: with_more(api, '"\\u0000\\u001b[31m": 1'), "\\x00\\x1b"),
}


@pytest.mark.parametrize("case", BODIES)
async def test_a_bad_body(world: World, api: Api, case: str) -> None:
    """400, and the message says what is wrong with it."""
    made, told = BODIES[case]
    body = made(api) if callable(made) else made
    world.check_error(api.shape, 400, await world.post(api.path, body), told=told)
    await check_next(world, api)


async def test_bad_bodies_are_refused_at_once(world: World) -> None:
    """Whatever is wrong with them, in less than 100 ms."""
    for api, (case, (made, _)) in itertools.product(APIS, BODIES.items()):
        body = made(api) if callable(made) else made

        async def refuse(path: str = api.path, body: bytes = body) -> None:
            status, _, _ = await world.post(path, body)
            assert status == 400

        await check_at_once(refuse, f"{api.path} {case}")


FIELDS = [
    (api, name) for api in APIS for name, reader in api.fields.items() if reader is not native_fields.ignore
]


@pytest.mark.parametrize(("api", "name"), FIELDS, ids=[f"{api.path} {name}" for api, name in FIELDS])
async def test_a_field_of_a_wrong_type(world: World, api: Api, name: str) -> None:
    """400, and the message names the field; a field that is ignored takes anything."""
    body = json.dumps({**api.good, name: [{}]}).encode()
    world.check_error(api.shape, 400, await world.post(api.path, body), told=name)
    await check_next(world, api)


def _tool(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


NESTED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "messages[0].content": ("/v1/chat/completions", {"messages": [{"role": "user", "content": 0}]}),
    "messages[0].tool_calls": (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": False}]},
    ),
    "tools[0].function.description": ("/v1/chat/completions", {"tools": _tool(description=0)}),
    "tools[0].function.parameters": ("/v1/chat/completions", {"tools": _tool(parameters="")}),
    "tools[0].description": (
        "/v1/messages",
        {"tools": [{"name": "f", "description": [], "input_schema": {}}]},
    ),
    "tools[0].parameters": ("/v1/responses", {"tools": [{"type": "function", "name": "f", "parameters": 0}]}),
    "input[0].content": ("/v1/responses", {"input": [{"role": "user", "content": False}]}),
}


@pytest.mark.parametrize("name", NESTED)
async def test_what_is_false_is_not_absent(world: World, name: str) -> None:
    """A field within another that has a wrong value is not taken for one that was left out."""
    path, fields = NESTED[name]
    api = next(one for one in APIS if one.path == path)
    reply = await world.post(path, json.dumps({**api.good, **fields}).encode())
    world.check_error(api.shape, 400, reply, told=f"{name}: ")
    await check_next(world, api)


_HUGE = {"title": "x" * 70_000}
BOUNDS: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]] = {
    "/v1/generate": [("max_tokens", {"max_tokens": 0}), ("n", {"n": 9}), ("stop", {"stop": [""]})],
    "/v1/chat/completions": [
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 10**6}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 99}),
        ("messages", {"messages": [{"role": "user", "content": "a"}] * 2_000}),
        ("tools", {"tools": _tool(parameters=_HUGE), "tool_choice": "required"}),
    ],
    "/v1/completions": [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("logprobs", {"logprobs": 99}),
    ],
    "/v1/responses": [
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_output_tokens", {"max_output_tokens": 10**6}),
        ("input", {"input": [{"role": "user", "content": "a"}] * 2_000}),
        ("temperature", {"temperature": 9}),
        (
            "tools",
            {"tools": [{"type": "function", "name": "f", "parameters": _HUGE}], "tool_choice": "required"},
        ),
    ],
    "/v1/messages": [
        ("max_tokens", {"max_tokens": 0}),
        ("stop_sequences", {"stop_sequences": [""]}),
        ("stop_sequences", {"stop_sequences": ["a"] * 65}),
        ("tools", {"tools": [{"name": "f", "input_schema": _HUGE}], "tool_choice": {"type": "any"}}),
    ],
}
BOUND = [
    pytest.param(api, name, fields, id=f"{api.path} {fields}"[:80])
    for api in APIS
    for name, fields in BOUNDS.get(api.path, ())
]


@pytest.mark.parametrize(("api", "name", "fields"), BOUND)
async def test_a_field_out_of_its_bounds(world: World, api: Api, name: str, fields: Any) -> None:
    """400, and the message begins with the name that the field has in this API, as `param` has it there."""
    reply = await world.post(api.path, json.dumps({**api.good, **fields}).encode())
    world.check_error(api.shape, 400, reply, told=f"{name}: ")
    error = json.loads(reply[2])["error"]
    assert error["message"].startswith(f"{name}: ")
    assert error.get("param", name) == name
    await check_next(world, api)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "x"],
)
async def test_another_content_type(world: World, api: Api, content_type: str) -> None:
    """400 that names the header, although the body is JSON."""
    reply = await world.post(api.path, json.dumps(api.good).encode(), content_type=content_type)
    world.check_error(api.shape, 400, reply, told="content-type")
    await check_next(world, api)


async def test_a_body_is_too_large_from_one_byte_over_the_limit_on(world: World, api: Api) -> None:
    """At the limit it is read, and may be refused for what it says; one byte more is 413."""
    fill = BODY_BYTES_MAX - len(api.with_text(""))
    at_limit = api.with_text("x" * fill)
    assert len(at_limit) == BODY_BYTES_MAX
    status, _, body = await world.post(api.path, at_limit)
    assert status in {200, 400}, body
    if status == 400:
        assert re.search("context|prompt is too long", message_of(api.shape, json.loads(body)))
    reply = await world.post(api.path, api.with_text("x" * (fill + 1)))
    world.check_error(api.shape, 413, reply, told=str(BODY_BYTES_MAX))
    await check_next(world, api)


LINKS: Mapping[str, tuple[Any, ...]] = {
    "/v1/generate": ({"type": "image_url", "image_url": {"url": "URL"}},),
    "/v1/chat/completions": (
        {"type": "image_url", "image_url": {"url": "URL"}},
        {"type": "file", "file": {"file_data": "URL", "filename": "a.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "URL", "format": "wav"}},
    ),
    "/v1/responses": (
        {"type": "input_image", "image_url": "URL", "detail": "auto"},
        {"type": "input_file", "file_url": "URL"},
    ),
    "/v1/messages": (
        {"type": "image", "source": {"type": "url", "url": "URL"}},
        {"type": "document", "source": {"type": "url", "url": "URL"}},
    ),
}
LINKS = {**LINKS, "/v1/messages/count_tokens": LINKS["/v1/messages"]}
LINKED = [(api, part) for api in APIS for part in LINKS.get(api.path, ())]


@pytest.mark.parametrize(("api", "part"), LINKED, ids=[f"{api.path} {part['type']}" for api, part in LINKED])
async def test_an_image_or_a_file_behind_a_url(world: World, api: Api, part: Any) -> None:
    """400 that names the part; nobody goes and fetches it."""
    place = "input" if api.path == "/v1/responses" else "messages"
    url = "http://{}:{}/a.png".format(*world.stranger.getsockname())
    turns = [{"role": "user", "content": [json.loads(json.dumps(part).replace("URL", url))]}]
    good = {name: value for name, value in api.good.items() if name != "text"}
    reply = await world.post(api.path, json.dumps({**good, place: turns}).encode())
    world.check_error(api.shape, 400, reply, told=f"{place}[0].content")
    await check_next(world, api)
    with pytest.raises(BlockingIOError):
        world.stranger.accept()


# The field that holds an answer to a schema, in each API that has one.
HELD = {
    "/v1/generate": "format.json_schema",
    "/v1/chat/completions": "response_format.json_schema.schema",
    "/v1/responses": "text.format.schema",
    "/v1/messages": "output_config.format.schema",
}


def _at(place: str, schema: Any) -> dict[str, Any]:
    """The fields of a request that hold its answer to a schema, at the place of that name."""
    outer, inner, *rest = place.split(".")
    match rest:
        case []:
            return {outer: {inner: schema}}
        case ["schema"] if inner == "format":
            return {outer: {inner: {"type": "json_schema", "name": "n", "schema": schema}}}
    return {outer: {"type": "json_schema", inner: {"name": "n", "schema": schema}}}


@pytest.mark.parametrize("path", HELD)
@pytest.mark.parametrize("schema", [7, [], "{", {"title": "x" * 70_000}], ids=["7", "[]", "text", "huge"])
async def test_a_schema_that_is_none(world: World, path: str, schema: Any) -> None:
    """400 before anything is compiled: no object, no JSON, and one that is too large."""
    api = next(one for one in APIS if one.path == path)
    fields = _at(HELD[path], schema)
    if api.shape == "anthropic":
        # The vendor's formats have no name.
        del fields["output_config"]["format"]["name"]
    reply = await world.post(path, json.dumps({**api.good, **fields}).encode())
    world.check_error(api.shape, 400, reply, told=f"{HELD[path]}: ")
    await check_next(world, api)


@pytest.mark.parametrize(
    ("token", "status", "told"),
    [
        ("", 401, "token"),
        ("Bearer nonsense", 401, "token"),
        (f"Bearer {make_token(ttl_s=-100)}", 401, "token"),
        (f"Bearer {make_token('alice', 'models:read')}", 403, "generate"),
        (f"Bearer {'x' * 12_000}", 401, "token"),
    ],
    ids=["missing", "nonsense", "expired", "scope", "long"],
)
async def test_a_bad_token(world: World, api: Api, token: str, status: int, told: str) -> None:
    """Told before a body is looked at: this one is none."""
    reply = await world.post(api.path, b"{", authorization=token)
    world.check_error(api.shape, status, reply, told=told)
    await check_next(world, api)


async def test_headers_that_are_too_large(world: World, api: Api) -> None:
    """431; from a multiple of the limit on Envoy does not read whose path it is. None reaches anybody."""
    reply = await world.post(api.path, b"{", authorization=f"Bearer {'x' * 50_000}")
    world.check_error(api.shape, 431, reply, told="headers")
    for size in (100_000, 1_000_000):
        status, _, body = await world.post(api.path, b"{", authorization=f"Bearer {'x' * size}")
        assert (status, "headers" in message_of("native", json.loads(body))) == (431, True)
    await check_next(world, api)


# A count reaches no worker.
WORKED = [api for api in APIS if not api.path.endswith("count_tokens")]


@pytest.mark.parametrize("api", WORKED, ids=lambda api: api.path)
async def test_special_tokens_in_a_text_are_text(world: World, api: Api) -> None:
    """What looks like a mark of the template is read as its characters."""
    worker = world.gateway.workers["w1"]
    status, _, _ = await world.post(api.path, api.with_text("<|im_end|>"))
    assert status == 200
    assert "<|im_end|>" in "".join(map(chr, worker.starts[-1].prompt_ids))


PATHS = {
    "/v1/generate/a/b": "native",
    "/v2/generate": "native",
    "/v1/chat": "openai",
    "/v1/chat/completions/chatcmpl-1": "openai",
    "/v1/completions/1": "openai",
    "/v1/responses/resp_1": "openai",
    "/v1/models/a/b": "openai",
    "/v1/messages/batches": "anthropic",
    "/v1/messages/count_tokens/1": "anthropic",
}


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_path(world: World, path: str) -> None:
    """404 in the shape of the API that the path looks like."""
    world.check_error(PATHS[path], 404, await world.post(path, b'{"text": "hi"}'), told="path")


async def test_another_method(world: World, api: Api) -> None:
    """404 as well, and it says that the method may be what is wrong."""
    headers = {"authorization": f"Bearer {make_token()}"}
    for method in ("GET", "PUT", "DELETE"):
        reply = await asyncio.to_thread(ask, world.address, method, api.path, b"", headers)
        world.check_error(api.shape, 404, reply, told="method")
    await check_next(world, api)
