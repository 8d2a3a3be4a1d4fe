"""The calls of a conversation. Owns: how they and their results are told to a model, whose result is whose.

Where a turn made one call, its result needs no name. Of several, each is told with its id, and so is what it
came to: results may come in any order.

    <tool_call>{"name": "weather", "arguments": {"city": "Paris"}, "id": "call_1"}</tool_call>
    <tool_response>{"id": "call_1", "name": "weather", "content": "rain"}</tool_response>
"""

from __future__ import annotations

import json

from services.common.errors import ArgumentInvalid
from services.common.strict_json import shown
from services.gateway.http.tool_calls import ToolCall, said_call, said_result


class ToldCalls:
    """The calls of one conversation, as it is read."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._beside_others: set[str] = set()

    def call(self, call: ToolCall, *, alone: bool) -> str:
        """A call of an earlier turn, in the model's words.

        Args:
            call: The call.
            alone: Whether its turn made no other one.
        """
        self._names[call.id] = call.name
        if alone:
            self._beside_others.discard(call.id)
            return said_call(call.name, call.arguments)
        self._beside_others.add(call.id)
        return said_call(call.name, call.arguments, call.id)

    def result(self, field: str, call_id: str, text: str) -> str:
        """What a call came to, as the model is told.

        Args:
            field: What the request calls the id.
            call_id: Whose result it is.
            text: The result.

        Raises:
            ArgumentInvalid: No turn before made such a call.
        """
        name = self._names.get(call_id)
        if name is None:
            raise ArgumentInvalid(f"{field}: {shown(call_id)} is the id of no call before it.")
        if call_id not in self._beside_others:
            return said_result(text)
        return said_result(json.dumps({"id": call_id, "name": name, "content": text}, ensure_ascii=False))
