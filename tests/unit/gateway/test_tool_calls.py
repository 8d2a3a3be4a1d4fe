"""Tools in a conversation: what a model is told, and what is read out of what it says."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.http.tool_calls import (
    BEGIN,
    CALLS_MAX,
    END,
    TOOLS_MAX,
    HeldText,
    Tool,
    call_begins_at,
    instructions,
    read_calls,
    said_call,
)
from services.gateway.http.tool_schemas import call_format

NAMES = frozenset({"weather", "time"})
CALL = said_call("weather", '{"city": "Paris"}')


def read(text: str, *, bare: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, without their ids."""
    before, calls = read_calls(text, NAMES, "c", bare=bare)
    assert [call.id for call in calls] == [f"c{at}" for at in range(len(calls))]
    return before, [(call.name, call.arguments) for call in calls]


def test_calls_are_read_out_of_the_text() -> None:
    """One, several, with words before, and with an end that a token limit cut off."""
    city = ("weather", '{"city": "Paris"}')
    assert read(CALL) == ("", [city])
    assert read(f"Let me see.\n{CALL}\n{said_call('time', '{}')}") == ("Let me see.", [city, ("time", "{}")])
    assert read(CALL.removesuffix(END)) == ("", [city])
    assert read(BEGIN + '\n{"name": "time", "parameters": {"a": 1}}\n' + END) == ("", [("time", '{"a": 1}')])
    assert read('{"name": "time", "arguments": {}}', bare=True) == ("", [("time", "{}")])


MARKED = tuple(
    said_call("weather", json.dumps({"city": city}))
    for city in (END, BEGIN, f'"{END}{BEGIN}', CALL, f"a {END}\n{{", "\\" + END)
)


@pytest.mark.parametrize("call", MARKED)
@pytest.mark.parametrize("spaces", ["", " \n"])
def test_marks_in_an_argument_end_no_call(call: str, spaces: str) -> None:
    """A call ends where its JSON does; whole, in two pieces cut anywhere, and as the first of two."""
    inner = call.removeprefix(BEGIN).removesuffix(END)
    call = BEGIN + spaces + inner + spaces + END
    wanted = ("weather", json.dumps(json.loads(inner)["arguments"], ensure_ascii=False))
    assert read(call) == read(call.removesuffix(END)) == ("", [wanted])
    two = f"Hm. {call}\n{said_call('time', '{}')}"
    assert read(two) == ("Hm.", [wanted, ("time", "{}")])
    for text in (call, two):
        for at in range(len(text)):
            held = HeldText(NAMES, "c", bare=False)
            said = [held.add(piece) or "" for piece in (text[:at], text[at:])]
            rest, calls = held.end()
            assert ("".join(said) + rest, calls) == read_calls(text, NAMES, "c", bare=False)


def test_what_is_broken_ends_at_the_first_mark() -> None:
    """And makes text of all, with a mark in its string as without."""
    for broken in (f'{{"name": "time", "arguments": {{"a": "{END}"}}', f'{{"name": "{END}"}} x', f'"{END}'):
        text = f"{BEGIN}{broken}{END}{CALL}"
        assert read(text) == (text, [])


@pytest.mark.parametrize("more", ["", "broken" + END, '{"name": "unknown"}' + END, CALL[len(BEGIN) :]])
def test_where_one_call_is_wanted_the_first_is_all(more: str) -> None:
    """What comes after it cannot undo it, whatever it is; a first one that is none stays text."""
    text = f"Hm. {CALL} {BEGIN}{more}"
    before, calls = read_calls(text, NAMES, "c", bare=False, single=True)
    assert (before, [(call.id, call.name) for call in calls]) == ("Hm.", [("c0", "weather")])
    broken = f"{BEGIN}broken{END}{CALL}"
    assert read_calls(broken, NAMES, "c", bare=False, single=True) == (broken, [])


def test_half_of_a_character_in_arguments_is_replaced() -> None:
    """A model can spell half of a surrogate pair, which no reply can carry; whole ones stay."""
    call = BEGIN + r'{"name": "time", "arguments": {"a": "\ud83d!", "b": "\ud83d\ude00"}}' + END
    ((_, arguments),) = read(call)[1]
    assert json.loads(arguments) == {"a": "\N{REPLACEMENT CHARACTER}!", "b": "😀"}
    arguments.encode()
    assert "\N{REPLACEMENT CHARACTER}!" in said_call("time", r'{"a": "\ud83d!"}')


def test_arguments_of_any_depth_are_told() -> None:
    """As JSON while they can be written, and from there on as the text that they are; nothing breaks."""

    def is_text(depth: int) -> bool:
        arguments = "[" * depth + "]" * depth
        said = said_call("time", arguments, "a").removeprefix(BEGIN).removesuffix(END)
        assert arguments in said
        return said.startswith('{"name": "time", "arguments": "')

    as_text = [is_text(depth) for depth in (*range(1, 2 * sys.getrecursionlimit()), 200_000)]
    assert as_text == sorted(as_text)
    assert (as_text[0], as_text[-1]) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "",
        BEGIN,
        BEGIN + END,
        BEGIN + '{"name": "unknown", "arguments": {}}' + END,
        BEGIN + '{"name": "time", "arguments": "x"}' + END,
        BEGIN + '{"name": ["time"], "arguments": {}}' + END,
        BEGIN + "not JSON" + END,
        BEGIN + "[" * 200_000 + END,
        f"{CALL} {BEGIN}broken{END}",
        BEGIN + '{"name": "time", "arguments": {"a": NaN}}' + END,
        BEGIN + '{"name": "time", "arguments": {"a": 1e999}}' + END,
    ],
    ids=range(12),
)
def test_what_is_no_call_stays_text(text: str) -> None:
    """As the model said it, to the letter."""
    assert read(text) == (text, [])


def test_hostile_text_takes_no_time() -> None:
    """A model can be made to say anything; reading it is linear, and calls are bounded."""
    began_s = time.monotonic()
    for text in (
        BEGIN * 100_000,
        (BEGIN + "{") * 100_000,
        BEGIN + "{" * 1_000_000,
        f"{BEGIN}{{}}" * 50_000,
        # Each of them is a string without an end, as far as its reader can tell.
        BEGIN + '"' + (END + BEGIN) * 50_000,
        f'{BEGIN}["{END}' * 50_000,
        f'{BEGIN}{{"a": "{END}"}} ' * 50_000,
        BEGIN + " " * 1_000_000,
    ):
        read(text)
        call_begins_at(text)
    assert time.monotonic() - began_s < 5
    assert len(read(CALL * (CALLS_MAX + 5))[1]) == CALLS_MAX


def test_a_forced_call_has_a_schema_that_holds_it() -> None:
    """One of the tools with its own arguments, and nothing beside."""
    tools = [Tool("weather", parameters={"type": "object", "required": ["city"]}), Tool("time")]
    form = call_format(tools)
    schema = json.loads(form.texts[0])
    jsonschema.validate({"name": "weather", "arguments": {"city": "x"}}, schema)
    jsonschema.validate({"name": "time", "arguments": {}}, schema)
    for wrong in ({"name": "weather", "arguments": {}}, {"name": "other", "arguments": {}}, {"name": "time"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_model_is_told_of_each_tool() -> None:
    """By name, description and schema."""
    words = instructions([Tool("weather", "Tells the weather.", {"type": "object"})])
    assert all(part in words for part in ("weather", "Tells the weather.", '"type": "object"', BEGIN, END))
    bare = instructions([Tool("weather")], bare=True)
    assert "weather" in bare
    assert BEGIN not in bare


def held(*texts: str, names: frozenset[str] = NAMES) -> tuple[list[str | None], str, list[str]]:
    """What is said of an answer without marks as it comes, and at its end: text and calls."""
    text = HeldText(names, "c", bare=True)
    said = [text.add(one) for one in texts]
    rest, calls = text.end()
    return said, rest, [call.name for call in calls]


def test_an_answer_without_marks_is_held_while_it_may_be_a_call() -> None:
    """However the model spaces it; another answer streams from where it cannot be one any more."""
    assert held('{ "na', 'me" :\n"weather"', ', "arguments": {"city": "Pa', 'ris"}}') == (
        [None] * 4,
        "",
        ["weather"],
    )
    assert held('{"name": "we', 'ird"}', " x") == ([None, '{"name": "weird"}', " x"], "", [])
    assert held('{"city"', ': "{\\"name\\": 1}"}') == (['{"city"', ': "{\\"name\\": 1}"}'], "", [])
    cut = '{"name": "weather", "arguments": {"ci'
    assert held(cut) == ([None], cut, [])
    assert held("{", '"name"', names=frozenset()) == (["{", '"name"'], "", [])


@pytest.mark.parametrize(
    ("answer", "arguments"),
    [
        ('{"name": "weather", "arguments": {"city": "Paris"}}', '{"city": "Paris"}'),
        ('\n{ "name":"weather",\n"arguments" : { } }\n', "{}"),
        ('{"name": "weather", "reason": "because"}', None),
        ('{"name": "weather"}', None),
        ('{"name": "weather", "parameters": {"city": "Paris"}}', None),
        ('{"arguments": {"city": "Paris"}, "name": "weather"}', None),
        ('{"name": "weather", "arguments": {"city": "Paris"}, "reason": "because"}', None),
        ('{"name": "weather", "arguments": {}, "name": "time"}', None),
        ('{"name": "weather", "arguments": "Paris"}', None),
        ('{"name": "weather", "arguments": {"city": NaN}}', None),
        ('{"name": "w\\u0065ather", "arguments": {}}', None),
        ('{"na me": "weather", "arguments": {}}', None),
        ('{"name": "other", "arguments": {}}', None),
        ('["weather"]', None),
        (f'{{"name":{" " * 500}"weather", "arguments": {{}}}}', "{}"),
    ],
)
def test_an_answer_that_only_resembles_a_call_is_none(answer: str, arguments: str | None) -> None:
    """A call without marks has its two fields and no other; told whole as it is told piece by piece."""
    before, calls = read(answer, bare=True)
    assert (before, calls) == ((answer, []) if arguments is None else ("", [("weather", arguments)]))
    said, rest, names = held(*answer)
    assert "".join(piece or "" for piece in said) + rest == before
    assert names == [name for name, _ in calls]


def test_what_a_held_answer_is_compared_with_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not anew with each chunk; and a call that has begun is held to its end without another look."""
    names = frozenset(f"function_{at}" for at in range(TOOLS_MAX))
    dumped: list[object] = []
    plain = json.dumps

    def dumps(value: object, **more: Any) -> str:
        dumped.append(value)
        return plain(value, **more)

    monkeypatch.setattr(json, "dumps", dumps)
    text = HeldText(names, "c", bare=True)
    answer = '{"name": "function_7", "arguments": {"a": "' + "x" * 500 + '"}}'
    assert [text.add(one) for one in answer] == [None] * len(answer)
    assert len(dumped) <= TOOLS_MAX
    assert [call.name for call in text.end()[1]] == ["function_7"]


def test_a_text_that_may_become_a_call_is_held() -> None:
    """From where its end may be the beginning of a mark; what stands before that is said at once."""
    assert call_begins_at("Hm. <tool") == 4
    assert call_begins_at(f"Hm. {BEGIN}x <") == 4
    assert call_begins_at("Hm. <b>") == 7
    text = HeldText(NAMES, "c", bare=False)
    said = [
        text.add(one) for one in ("Let me see. <tool", "_c", "ups> or ", "not", f" {CALL[:20]}", CALL[20:])
    ]
    assert said == ["Let me see.", None, " <tool_cups> or", " not", None, None]
    rest, calls = text.end()
    assert (rest, [call.name for call in calls]) == ("", ["weather"])


WORDS = ("a", " ", "\n", "<", "<tool", "b>", BEGIN, END, CALL, said_call("time", "{}"), MARKED[2], "é")


@given(st.lists(st.sampled_from(WORDS), max_size=8).map("".join), st.lists(st.integers(1, 40), max_size=60))
def test_any_grouping_of_tokens_says_the_same(text: str, sizes: list[int]) -> None:
    """At every moment that which nothing can make a part of a call, or of the space before one, any more."""
    held, said, at = HeldText(NAMES, "c", bare=False), "", 0
    for size in [*sizes, len(text)]:
        piece = held.add(text[at : at + size])
        at = min(at + size, len(text))
        said += piece or ""
        begun = text[:at]
        before = begun.partition(BEGIN)[0]
        if BEGIN not in begun and (mark := before.rfind("<")) >= 0 and BEGIN.startswith(before[mark:]):
            before = before[:mark]
        assert said == before.rstrip()
        assert (piece is None) <= (len(said) < len(begun))
    rest, calls = held.end()
    assert (said + rest, calls) == read_calls(text, NAMES, "c", bare=False)
