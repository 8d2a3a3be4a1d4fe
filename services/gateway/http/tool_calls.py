"""Tools in a conversation. Owns: how they are told to a model, and how its calls are read out of its text.

Models that learned tools learned to write a call as JSON between two marks; a model's own template may know
more, but none is asked: what is said here every chat model can read. Pure.

    <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>

A call in an answer that is held to a schema is bare: it has no marks, and is all of the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid
from services.common.strict_json import shown
from services.gateway.http import native_fields

BEGIN, END = "<tool_call>", "</tool_call>"

# A prompt has room for no more.
TOOLS_MAX = 128

# What may stand between the parts of the opening of a bare call.
_SPACES_MAX = 128

# What a model says of calls is read up to here; more is no call.
CALLS_MAX = 32

_DECODER = json.JSONDecoder()
_SPACES = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: Its name.
        description: What it does, for the model.
        parameters: A JSON schema of its arguments.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wants made: its id, the function, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str


def read_tools(name: str, value: Any, read_one: Callable[[str, Any], Tool]) -> tuple[Tool, ...]:
    """The tools of a request, each read by `read_one` as its API writes them.

    Raises:
        ArgumentInvalid: They are no array, too many, or two of them have one name.
    """
    given = native_fields.read_array(name, value)
    if len(given) > TOOLS_MAX:
        raise ArgumentInvalid(f"{name}: at most {TOOLS_MAX} are allowed.")
    tools = tuple(read_one(f"{name}[{at}]", tool) for at, tool in enumerate(given))
    if len({tool.name for tool in tools}) != len(tools):
        raise ArgumentInvalid(f"{name}: two have the same name.")
    return tools


def instructions(tools: Sequence[Tool], *, bare: bool = False) -> str:
    """What the model is told of its tools, in the system's words.

    Args:
        tools: What it may call.
        bare: Whether a call has no marks.
    """
    lines = "\n".join(
        json.dumps(
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            ensure_ascii=False,
        )
        for tool in tools
    )
    return (
        f"You can call these functions:\n{lines}\n"
        f"To call one, answer with {'' if bare else BEGIN}"
        '{"name": "<its name>", "arguments": {<its arguments>}}'
        f"{'' if bare else END} and nothing else. Its result follows as the next message."
    )


def instructed(turns: Sequence[Message], tools: Sequence[Tool], *, bare: bool = False) -> list[Message]:
    """The conversation with what the model is told of its tools in the system's part of it."""
    words = instructions(tools, bare=bare)
    if turns and turns[0].role == "system":
        return [Message("system", f"{turns[0].content}\n\n{words}"), *turns[1:]]
    return [Message("system", words), *turns]


def chosen(tools: tuple[Tool, ...], choice: str) -> tuple[tuple[Tool, ...], bool]:
    """The tools that the model is told of, and whether it must call one.

    Args:
        tools: All of them.
        choice: `auto`, `none`, `required`, or `function:` with the name of the one to call.

    Raises:
        ArgumentInvalid: There is no such tool, or none at all to be called.
    """
    if not tools:
        if choice not in {"auto", "none"}:
            raise ArgumentInvalid("tool_choice: needs tools.")
        return (), False
    if choice == "none":
        return (), False
    if choice in {"auto", "required"}:
        return tools, choice == "required"
    name = choice.removeprefix("function:")
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        raise ArgumentInvalid(f"tool_choice: {shown(name)} is not among the tools.")
    return named, True


def said_call(name: str, arguments: str, call_id: str = "") -> str:
    """A call of an earlier turn, as the model would have written it; with its id where that is told."""
    try:
        said = _told(name, json.loads(arguments), call_id)
    except (ValueError, RecursionError):
        # No JSON; or nested so deeply that it is read, and one level deeper, as here, it is not written.
        said = _told(name, arguments, call_id)
    return BEGIN + _whole_characters(said) + END


def _told(name: str, arguments: Any, call_id: str) -> str:
    fields = {"name": name, "arguments": arguments, **({"id": call_id} if call_id else {})}
    return json.dumps(fields, ensure_ascii=False)


def said_result(text: str) -> str:
    """What a call came to, as the model is told."""
    return f"<tool_response>{text}</tool_response>"


def read_calls(
    text: str, names: frozenset[str], id_of: str, *, bare: bool, single: bool = False
) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls of functions that exist.

    What looks like a call and is none stays text, as the model said it.

    Args:
        text: The whole answer.
        names: The functions that exist; none: there are no calls.
        id_of: What the ids of calls begin with.
        bare: Whether a call is all of the answer, without marks.
        single: Whether no more than the first call is wanted.
    """
    if not names:
        return text, []
    # Where one is wanted, what comes after it is not read: broken, it would make text of the good one.
    found = [text] if bare else _marked(text, 1 if single else CALLS_MAX)
    calls: list[ToolCall] = []
    read = _read_bare if bare else _read
    for source in found:
        call = read(source, names, f"{id_of}{len(calls)}")
        if call is None:
            return text, []
        calls.append(call)
    before = "" if bare or not calls else text[: text.index(BEGIN)].rstrip()
    return (before, calls) if calls else (text, [])


def _marked(text: str, most: int) -> list[str]:
    """What stands between the first marks; the last end may be missing.

    Takes time as the text is long, for each of `most`: what is no JSON may be read to the end of the text.
    """
    found: list[str] = []
    begin = text.find(BEGIN)
    while begin >= 0 and len(found) < most:
        begin += len(BEGIN)
        end = _json_ends_at(text, begin)
        if end is None:
            end = text.find(END, begin)
            end = len(text) if end < 0 else end
        found.append(text[begin:end])
        begin = text.find(BEGIN, end)
    return found


def _json_ends_at(text: str, begin: int) -> int | None:
    """Where the end mark stands, or the text ends, behind JSON, whose strings may have marks in them.

    None: there is no JSON, or something else behind it.
    """
    try:
        _, end = _DECODER.raw_decode(text, _after_spaces(text, begin))
    except (ValueError, RecursionError):
        return None
    end = _after_spaces(text, end)
    return end if end == len(text) or text.startswith(END, end) else None


def _after_spaces(text: str, at: int) -> int:
    # What JSON takes for white space; with no character at all it matches as well.
    spaces = _SPACES.match(text, at)
    return at if spaces is None else spaces.end()


class HeldText:
    """The text of a stream, of which that is held back which may be a call.

    What may be a call is told at the end, whole: a part of one is of no use to anybody. White space is held
    until it is known what it stands before, as there is none before a call. So what is said depends on the
    text so far, and not on the pieces that it came in.

    Args:
        names: The functions that exist; none: nothing is held.
        id_of: What the ids of calls begin with.
        bare: Whether a call is all of the answer, without marks.
        single: Whether no more than the first call is wanted.
    """

    def __init__(self, names: frozenset[str], id_of: str, *, bare: bool, single: bool = False) -> None:
        self._names = names
        self._id_of = id_of
        self._bare = bare
        self._single = single
        self._held = ""
        self._is_text = not names
        # What a bare call of each begins with; none any more once it is known whether this is one.
        self._openings = _openings(names) if bare else ()

    def add(self, text: str) -> str | None:
        """Takes in more text; returns what can be said now, None while it is held."""
        self._held += text
        if self._openings:
            self._look_for_opening()
        cut = len(self._held)
        if not self._is_text:
            cut = 0 if self._bare else len(self._held[: call_begins_at(self._held)].rstrip())
        said, self._held = self._held[:cut], self._held[cut:]
        return said if said or not self._held else None

    def _look_for_opening(self) -> None:
        """Finds out whether the answer is a call without marks, or cannot be one, once that is known."""
        # Between the parts of JSON there is white space, but not much of it.
        begun = _unspaced(self._held[: 4 * max(map(len, self._openings)) + _SPACES_MAX])
        if any(map(begun.startswith, self._openings)):
            self._openings = ()
        elif not any(opening.startswith(begun) for opening in self._openings):
            self._openings, self._is_text = (), True

    def end(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls in it."""
        return read_calls(self._held, self._names, self._id_of, bare=self._bare, single=self._single)


def call_begins_at(text: str) -> int:
    """Where a call begins in a text, or may begin with what follows; the text's length: nowhere."""
    begin = text.find(BEGIN)
    if begin >= 0:
        return begin
    sizes = (size for size in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:size]))
    return len(text) - next(sizes, 0)


def _openings(names: frozenset[str]) -> tuple[str, ...]:
    """What calls of `names` begin with where they have no marks, without white space."""
    return tuple(
        _unspaced(json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)[:-2]) for name in names
    )


def _unspaced(text: str) -> str:
    return "".join(text.split())


def _read(source: str, names: frozenset[str], call_id: str) -> ToolCall | None:
    fields = _fields(source)
    return _call(fields, fields.get("arguments", fields.get("parameters", {})), names, call_id)


def _read_bare(source: str, names: frozenset[str], call_id: str) -> ToolCall | None:
    """A call without marks: it begins as `HeldText` expects, and has what its schema demands, and no more.

    Whatever else has a function's name in it is an answer that fits the schema of answers.
    """
    fields = _fields(source)
    call = _call(fields, fields.get("arguments"), names, call_id)
    if call is None or fields.keys() != {"name", "arguments"}:
        return None
    (opening,) = _openings(frozenset({call.name}))
    return call if _unspaced(source).startswith(opening) else None


def _fields(source: str) -> dict[str, Any]:
    """Those of a JSON object; none where there is no such thing."""
    try:
        fields = json.loads(source)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _call(fields: dict[str, Any], arguments: Any, names: frozenset[str], call_id: str) -> ToolCall | None:
    name = fields.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    try:
        # What Python reads and JSON does not have, as NaN, is no argument.
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return ToolCall(call_id, name, _whole_characters(written))


def _whole_characters(text: str) -> str:
    """The same with halves of surrogate pairs replaced: a model can spell one, and nobody can write it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
