"""One reading of every body, in bounded time."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ArgumentInvalid
from services.common.strict_json import DEPTH_MAX, NODES_MAX, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_every_json_object_is_read_as_it_is(value: dict[str, Any]) -> None:
    """Strictness refuses nothing that is plain JSON."""
    assert read_object(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_an_error(body: bytes) -> None:
    """Nothing else comes out."""
    with contextlib.suppress(ArgumentInvalid):
        assert isinstance(read_object(body), dict)


def test_brackets_in_strings_are_no_nesting() -> None:
    """Depth counts structure alone, to the level."""
    assert read_object(json.dumps({"a": "[" * 1000 + '\\"'}).encode())["a"].startswith("[")
    nested = b'{"a":' + b"[" * (DEPTH_MAX - 1) + b"]" * (DEPTH_MAX - 1) + b"}"
    assert read_object(nested)
    with pytest.raises(ArgumentInvalid, match="nested"):
        read_object(b'{"a":' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}")


SHAPES = st.recursive(
    st.sampled_from([[], {}, 1, "[{", '"]}\\']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("a[}"), inner, max_size=3),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    """How deeply arrays and objects nest."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(SHAPES, SHAPES, st.integers(DEPTH_MAX - 8, DEPTH_MAX))
def test_depth_is_counted_whatever_stands_beside_it(inner: Any, beside: Any, levels: int) -> None:
    """What is at the limit is read, and one level more is refused."""
    for _ in range(levels):
        inner = [beside, inner] if levels % 2 else {"a": inner, "b": beside}
    value = {"a": beside, "b": inner}
    body = json.dumps(value).encode()
    if depth_of(value) <= DEPTH_MAX:
        assert read_object(body) == value
        return
    with pytest.raises(ArgumentInvalid, match="nested"):
        read_object(body)


@pytest.mark.parametrize("empty", ["[]", "{}"])
def test_a_body_has_so_many_arrays_and_objects(empty: str) -> None:
    """Each costs memory and time far beyond its bytes; those in strings are none."""
    at_limit = ",".join([empty] * (NODES_MAX - 2))
    assert read_object(f'{{"a": [{at_limit}], "b": "{"[" * NODES_MAX}"}}'.encode())
    with pytest.raises(ArgumentInvalid, match=str(NODES_MAX)):
        read_object(f'{{"a": [{at_limit},[]]}}'.encode())


@pytest.mark.parametrize("body", [b'{"a": [1, 2}', b'{"a": ' + b"]" * 100 + b"}", b"{" * 9 + b"]" * 40])
def test_brackets_that_do_not_match_are_told_as_such(body: bytes) -> None:
    """They are no nesting."""
    with pytest.raises(ArgumentInvalid, match="not JSON"):
        read_object(body)


@pytest.mark.parametrize(
    "body",
    [
        rb'{"a": 1, "b": "x\ud800"}',
        rb'{"b": "\uDE00\uD83D"}',
        rb'{"b": {"deep": ["\ud83d\ud83d\ude00"]}}',
        rb'{"b": {"\udfff": 1}}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_the_name_of_its_field(body: bytes) -> None:
    """Wherever it stands: nobody could write it down again; whole pairs and their like in text are taken."""
    with pytest.raises(ArgumentInvalid, match=r"^b: is not valid Unicode"):
        read_object(body)
    assert read_object(rb'{"\ud83d\ude00": "\\ud800 \uD83D\uDE00"}') == {"😀": "\\ud800 😀"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1.5, "b": 1e400}',
        b'{"b": {"deep": [1, -1e400]}}',
        b'{"b": [' + b"9" * 400 + b".0]}",
    ],
)
def test_a_number_beyond_double_precision_is_refused_by_the_name_of_its_field(body: bytes) -> None:
    """Wherever it stands: read as infinity, it could not be written again; the largest is taken."""
    with pytest.raises(ArgumentInvalid, match=r"^b: has a number that is out of range"):
        read_object(body)
    assert read_object(b'{"b": [1.7976931348623157e308, -1e-400]}') == {"b": [sys.float_info.max, 0.0]}


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 900_000, b'"' * 1_900_000, b'{"' + b"\\" * 1_900_000])
def test_a_string_that_never_ends_costs_linear_time(body: bytes) -> None:
    """Two megabytes of quotes are refused at once; a quadratic reader would take hours."""
    started_s = time.monotonic()
    with pytest.raises(ArgumentInvalid):
        read_object(body)
    assert time.monotonic() - started_s < 5
