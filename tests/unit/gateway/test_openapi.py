"""What `/openapi.json` says of answers that generated requests seldom reach, held to real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from interlock.http.v1 import http_service_pb2
from interlock.v1 import controller_service_pb2

from services.gateway.core.events import Chunk, Finished, FinishReason, TokenLogprob, Usage
from services.gateway.http import anthropic, native_fields, openai, openapi, openapi_parts, responses
from services.gateway.http.tool_calls import ToolCall
from tests.fakes.gateway_ports import FakeTokenizer

DOCUMENT = openapi.document()
CALL = ToolCall("call_1_0", "weather", '{"city": "Paris"}')
ENDS = [Finished(reason, usage=Usage(3, 1, 2)) for reason in (FinishReason.STOP, FinishReason.LENGTH)]
SCORES = (TokenLogprob(-1.0, ((7, -1.0), (9, -2.0))), TokenLogprob(-0.5))
CHUNK = Chunk(0, "ab", (7, 8), SCORES)
REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": 5,
    "metadata": {},
    "parallel_tool_calls": True,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": {"type": "function", "name": "weather"},
    "tools": [
        {"type": "function", "name": "weather", "description": None, "parameters": {}, "strict": False}
    ],
    "top_p": 1.0,
}


def check(name: str, body: Any) -> None:
    """Fails unless a body is what the document says under a name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


@pytest.mark.parametrize("finished", ENDS, ids=["stop", "length"])
@pytest.mark.parametrize("calls", [[], [CALL]], ids=["text", "call"])
def test_answers_with_calls_and_scores(finished: Finished, calls: list[ToolCall]) -> None:
    """Bodies as the vendors' writers make them."""
    head = openai.Head("chatcmpl-1", 1, "m", "r")
    scores = openai.chat_logprobs([CHUNK], FakeTokenizer().piece)
    choice = openai.chat_choice("ab", calls, finished, scores)
    check("OpenAiChat", json.loads(b"".join(openai.chat_body(head, [choice], finished.usage))))
    told = openai.completion_choice(
        "ab", finished, openai.completion_logprobs([CHUNK], FakeTokenizer().piece, int)
    )
    check("OpenAiText", json.loads(b"".join(openai.completion_body(head, [told], finished.usage))))
    asked = responses.Head("1", 1, "m", REPEATED)
    check("OpenAiResponse", json.loads(responses.response_body(asked, "ab", calls, finished)))
    check("AnthropicMessage", json.loads(anthropic.message_body("msg_1", "m", "ab", calls, finished)))


def test_a_description_notices_what_it_does_not_say() -> None:
    """Schemas are closed: one field more in an answer, or one of another type, is a breach."""
    choice = openai.chat_choice("ab", [], ENDS[0], None)
    body = json.loads(b"".join(openai.chat_body(openai.Head("1", 1, "m", "r"), [choice], Usage())))
    for wrong in ({**body, "more": 1}, {**body, "created": "now"}):
        with pytest.raises(jsonschema.ValidationError):
            check("OpenAiChat", wrong)


def filled(message: Message, depth: int = 0) -> Message:
    """A message with a value in every field, of repeated ones one."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            place = getattr(message, field.name)
            one = place.add() if field.is_repeated else place
            one.SetInParent()
            filled(one, depth + 1)
            continue
        value: Any = {FieldDescriptor.TYPE_STRING: "x", FieldDescriptor.TYPE_BOOL: True}.get(field.type, 1)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def answers() -> Mapping[str, type[Message]]:
    """What each admin path answers, by the name of its message."""
    methods = http_service_pb2.DESCRIPTOR.services_by_name["AdminHttpService"].methods
    service = controller_service_pb2.DESCRIPTOR.services_by_name["ControllerService"]
    names = {service.methods_by_name[method.name].output_type.name for method in methods}
    return {name: getattr(controller_service_pb2, name) for name in sorted(names)}


@pytest.mark.parametrize("name", answers())
def test_admin_answers(name: str) -> None:
    """Empty, and with something in every field, as the controller writes them."""
    for message in (answers()[name](), filled(answers()[name]())):
        text = json_format.MessageToJson(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        check(name, json.loads(text))


def test_every_admin_method_has_a_path() -> None:
    """As many operations as Envoy maps."""
    methods = http_service_pb2.DESCRIPTOR.services_by_name["AdminHttpService"].methods
    described = {
        operation["operationId"]
        for path, entry in DOCUMENT["paths"].items()
        if path.startswith("/v1/admin/")
        for verb, operation in entry.items()
        if verb != "parameters"
    }
    assert described == {f"admin{method.name}" for method in methods}


def test_a_field_cannot_be_served_and_not_described() -> None:
    """A reader of which nothing is known stops the start, and so does a field that nothing reads."""
    with pytest.raises(KeyError):
        openapi_parts.body({"new": lambda name, value: (name, value)})
    with pytest.raises(KeyError):
        openapi_parts.body({"model": native_fields.read_text}, own={"gone": {}})
