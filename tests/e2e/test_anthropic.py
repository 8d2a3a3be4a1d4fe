"""Anthropic's own client before a whole mesh with the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import anthropic
import pytest

from tests.fixtures.mesh import MODEL, ROOT, Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32,
    "messages": [{"role": "user", "content": QUESTION}],
    # Greedy, so that there is one right answer; this client has no argument for it any more.
    "extra_body": {"temperature": 0},
}


def test_the_model_answers_whole_streamed_and_to_a_schema(mesh: Mesh) -> None:
    """The greedy text is the native API's, by both ways, and a schema holds."""
    with anthropic.Anthropic(base_url=mesh.url, api_key=mesh.token) as client:
        message: Any = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            streamed = "".join(stream.text_stream)
        counted = client.messages.count_tokens(model=MODEL, messages=ASKED["messages"])
        schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
        form: Any = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
        shaped: Any = client.messages.create(**ASKED, output_config=form)
    assert message.content[0].text == streamed == mesh.ask(QUESTION, max_tokens=32)
    assert "Paris" in streamed
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert json.loads(shaped.content[0].text) == {"city": "Paris"}


def test_the_example_prints_an_answer_and_names_an_error(mesh: Mesh) -> None:
    """`examples/anthropic_chat.py`, once with a good token and once with a bad one."""

    def run(token: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "examples/anthropic_chat.py", mesh.url, token, MODEL, QUESTION]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)

    good, bad = run(mesh.token), run("nonsense")
    assert (good.returncode, "tokens]" in good.stdout) == (0, True), good.stderr
    assert (bad.returncode, "AuthenticationError" in bad.stderr) == (1, True), bad.stderr
