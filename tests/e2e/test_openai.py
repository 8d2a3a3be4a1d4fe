"""OpenAI's own client before a whole mesh with the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import openai
import pytest

from tests.fixtures.mesh import MODEL, ROOT, Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32,
    "temperature": 0,
    "messages": [{"role": "user", "content": QUESTION}],
}


def test_the_model_answers_whole_streamed_and_to_a_schema(mesh: Mesh) -> None:
    """The greedy text is the native API's, by both ways; a schema holds, and a tool is called."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "c", "schema": {**schema, "additionalProperties": False}},
    }
    tool = {
        "type": "function",
        "function": {"name": "travel", "parameters": json.loads(json.dumps(form["json_schema"]))["schema"]},
    }
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token) as client:
        create: Any = client.chat.completions.create
        completion = create(**ASKED)
        chunks = list(create(**ASKED, stream=True, stream_options={"include_usage": True}))
        shaped = create(**ASKED, response_format=form)
        called = create(**ASKED, tools=[tool], tool_choice="required")
        listed = [model.id for model in client.models.list()]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert completion.choices[0].message.content == streamed == mesh.ask(QUESTION, max_tokens=32)
    assert "Paris" in streamed
    assert chunks[-1].usage.completion_tokens == completion.usage.completion_tokens
    assert json.loads(shaped.choices[0].message.content) == {"city": "Paris"}
    (call,) = called.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("travel", {"city": "Paris"})
    assert listed == [MODEL]


def test_several_answers_of_one_seed(mesh: Mesh) -> None:
    """Each is the same every time, by both ways, and unlike the others; the first is what one alone is."""
    asked = {**ASKED, "temperature": 1.0, "seed": 5, "max_tokens": 24}
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token) as client:
        create: Any = client.chat.completions.create
        alone = create(**asked).choices[0].message.content
        whole = create(**asked, n=3)
        streamed = ["", "", ""]
        for chunk in create(**asked, n=3, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        greedy = create(**ASKED, n=2)
    said = [choice.message.content for choice in whole.choices]
    assert said == streamed
    assert said[0] == alone
    assert len(set(said)) == 3
    assert whole.usage.completion_tokens > 24
    assert {choice.message.content for choice in greedy.choices} == {mesh.ask(QUESTION, max_tokens=32)}


def test_code_that_names_another_model_is_answered(mesh: Mesh) -> None:
    """`gpt-*` means the model that the mesh serves; what nobody knows stays unknown."""
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token, max_retries=0) as client:
        create: Any = client.chat.completions.create
        assert create(**{**ASKED, "model": "gpt-4o-mini", "max_tokens": 1}).model == MODEL
        with pytest.raises(openai.NotFoundError):
            create(**{**ASKED, "model": "nope"})


def test_a_response_is_the_same_answer(mesh: Mesh) -> None:
    """The Responses API says what the chat says, whole and in events."""
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token) as client:
        create: Any = client.responses.create
        asked = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 32}
        whole = create(**asked).output_text
        streamed = "".join(event.delta for event in create(**asked, stream=True) if hasattr(event, "delta"))
    assert whole == streamed == mesh.ask(QUESTION, max_tokens=32)


def test_a_response_calls_a_tool_and_goes_on_with_its_result(mesh: Mesh) -> None:
    """The model's own call, whole and in events; with what it came to the conversation is answered."""
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "name": "travel", "parameters": parameters, "strict": True}
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 32, "tools": [tool]}
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token) as client:
        create: Any = client.responses.create
        (call,) = create(**asked, input=QUESTION, tool_choice="required").output
        events = list(create(**asked, input=QUESTION, tool_choice="required", stream=True))
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "You are in Paris now."}
        turns = [{"role": "user", "content": QUESTION}, call, result]
        answer = create(**asked, input=turns, tool_choice="none")
    assert (call.name, json.loads(call.arguments)) == ("travel", {"city": "Paris"})
    (streamed,) = events[-1].response.output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text


def test_a_text_is_completed(mesh: Mesh) -> None:
    """Without the chat template, with scores."""
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.token) as client:
        complete: Any = client.completions.create
        text = complete(
            model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=1
        )
    (choice,) = text.choices
    assert "Paris" in choice.text
    assert "".join(choice.logprobs.tokens) == choice.text


def test_the_example_runs_as_it_is(mesh: Mesh) -> None:
    """It asks, and streams."""
    done = subprocess.run(
        [sys.executable, "examples/openai_chat.py", f"{mesh.url}/v1"],
        env=mesh.environment | {"OPENAI_API_KEY": mesh.token},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
