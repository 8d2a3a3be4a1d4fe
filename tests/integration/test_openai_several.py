"""Several answers to one question, for the vendor's own Python client through a real Envoy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.scripted_worker import Script
from tests.fixtures.gateway_world import MODEL
from tests.fixtures.openai_world import ASKED, CALL, WEATHER, World, check, openai_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """The client before a gateway without a worker."""
    async with openai_world(tmp_path) as made:
        yield made


async def test_several_answers(world: World) -> None:
    """A choice each, with its own index and end; the usage counts the prompt once, whole and streamed."""
    said = ["first", "a second one", "third"]
    await world.gateway.add_worker("w1", Script(answer=said[0], others=tuple(said[1:])))
    response = await world.client.chat.completions.with_raw_response.create(**ASKED, n=3, max_tokens=8)
    completion = response.parse()
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.message.content for choice in completion.choices] == ["first", "a second", "third"]
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "length", "stop"]
    usage = completion.usage
    assert usage.completion_tokens == 5 + 8 + 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    check("CreateChatCompletionResponse", response.http_response.json())
    asked = {"n": 3, "max_tokens": 8, "stream": True, "logprobs": True}
    chunks = [chunk async for chunk in await world.create(**asked, stream_options={"include_usage": True})]
    streamed, ends, scored = ["", "", ""], {}, [0, 0, 0]
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))
        for choice in chunk.choices:
            assert choice.index not in ends
            streamed[choice.index] += choice.delta.content or ""
            scored[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert streamed == ["first", "a second", "third"]
    assert (scored, ends) == ([5, 8, 5], {0: "stop", 1: "length", 2: "stop"})
    assert [chunk.usage for chunk in chunks if chunk.usage] == [usage]
    roles = [choice.delta.role for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert roles == ["assistant"] * 3


async def test_several_answers_with_tools(world: World) -> None:
    """One choice calls and another one speaks; the calls of all have ids of their own."""
    await world.gateway.add_worker("w1", Script(answer=CALL, others=("No need.", CALL)))
    completion = await world.create(n=3, tools=[WEATHER], max_tokens=100)
    assert [choice.finish_reason for choice in completion.choices] == ["tool_calls", "stop", "tool_calls"]
    calls = [call for choice in completion.choices for call in choice.message.tool_calls or ()]
    assert len({call.id for call in calls}) == 2
    chunks = [chunk async for chunk in await world.create(n=3, tools=[WEATHER], max_tokens=100, stream=True)]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    ends = {choice.index: choice.finish_reason for choice in choices if choice.finish_reason}
    assert ends == {0: "tool_calls", 1: "stop", 2: "tool_calls"}
    assert [choice.index for choice in choices if choice.delta.tool_calls] in ([0, 2], [2, 0])
    assert "".join(choice.delta.content or "" for choice in choices if choice.index == 1) == "No need."


async def test_several_completions_of_a_text(world: World) -> None:
    """Each says the prompt again, or has scores of its own; `best_of` may say what `n` says."""
    await world.gateway.add_worker("w1", Script(answer="one", others=("another",)))
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Once ", "n": 2}
    starts = [list(range(3)), list(range(7))]
    for more, before, offsets in (({"echo": True}, "Once ", [[], []]), ({"logprobs": 0}, "", starts)):
        response = await world.client.completions.with_raw_response.create(**asked, **more, best_of=2)
        completion = response.parse()
        said = [f"{before}one", f"{before}another"]
        assert [choice.text for choice in completion.choices] == said
        assert [choice.index for choice in completion.choices] == [0, 1]
        assert [scores_of(choice) for choice in completion.choices] == offsets
        assert completion.usage.completion_tokens == 3 + 7
        check("CreateCompletionResponse", response.http_response.json())
        stream = await world.client.completions.create(
            **asked, **more, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        streamed = ["", ""]
        scored: list[list[int]] = [[], []]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            streamed[choice.index] += choice.text
            scored[choice.index] += scores_of(choice)
        assert (streamed, scored) == (said, offsets)
        assert chunks[-1].usage == completion.usage
    for refused in ({"best_of": 2}, {"echo": True, "logprobs": 0}):
        with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
            await world.client.completions.create(model=MODEL, prompt="Once", **refused)


def scores_of(choice: Any) -> list[int]:
    """Where the tokens of a choice begin; none where it has no scores."""
    return choice.logprobs.text_offset if choice.logprobs else []
