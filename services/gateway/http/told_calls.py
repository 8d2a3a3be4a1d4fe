"""The calls of a conversation. Owns: how they and their results are told to a model, whose result is whose.

Where a turn made one call, its result needs no name. Of several, each is told with its id, and so is what it
came to: results may come in any order.

    <tool_call>{"name": "weather", "arguments": {"city": "Paris"}, "id": "call_1"}</tool_call>
    <tool_response>{"id": "call_1", "name": "weather", "content": "rain"}</tool_response>

A name is told again with each result, so what is told is bounded here, before it is kept.
"""

from __future__ import annotations

import json
from typing import Any

from services.common.errors import ArgumentInvalid
from services.common.strict_json import shown
from services.gateway.core.validation import PROMPT_BYTES_MAX
from services.gateway.http import native_fields
from services.gateway.http.tool_calls import ToolCall, said_call, said_result

# The longest that a vendor takes.
NAME_CHARACTERS_MAX = 200


def read_name(name: str, value: Any) -> str:
    """The name of a function. Raises ArgumentInvalid for what is no text, or longer than any vendor's."""
    text = native_fields.read_text(name, value)
    if len(text) > NAME_CHARACTERS_MAX:
        raise ArgumentInvalid(f"{name}: at most {NAME_CHARACTERS_MAX} characters are allowed.")
    return text


class ToldCalls:
    """The calls of one conversation, as it is read.

    Args:
        conversation: What the request calls the conversation.
    """

    def __init__(self, conversation: str) -> None:
        self._conversation = conversation
        self._told_characters = 0
        self._names: dict[str, str] = {}
        self._beside_others: set[str] = set()

    def call(self, call: ToolCall, *, alone: bool) -> str:
        """A call of an earlier turn, in the model's words.

        Args:
            call: The call.
            alone: Whether its turn made no other one.

        Raises:
            ArgumentInvalid: No prompt has room for all that is told.
        """
        self._names[call.id] = call.name
        if alone:
            self._beside_others.discard(call.id)
            return self._counted(said_call(call.name, call.arguments))
        self._beside_others.add(call.id)
        return self._counted(said_call(call.name, call.arguments, call.id))

    def result(self, field: str, call_id: str, text: str) -> str:
        """What a call came to, as the model is told.

        Args:
            field: What the request calls the id.
            call_id: Whose result it is.
            text: The result.

        Raises:
            ArgumentInvalid: No turn before made such a call, or no prompt has room for all that is told.
        """
        name = self._names.get(call_id)
        if name is None:
            raise ArgumentInvalid(f"{field}: {shown(call_id)} is the id of no call before it.")
        if call_id not in self._beside_others:
            return self._counted(said_result(text))
        told = json.dumps({"id": call_id, "name": name, "content": text}, ensure_ascii=False)
        return self._counted(said_result(told))

    def _counted(self, told: str) -> str:
        # A character has a byte or more: what is too much here would be refused as a prompt as well.
        self._told_characters += len(told)
        if self._told_characters > PROMPT_BYTES_MAX:
            raise ArgumentInvalid(f"{self._conversation}: together at most {PROMPT_BYTES_MAX} bytes.")
        return told
