"""JSON without surprises. Owns: which bytes count as one JSON object, and how the rest is told.

Two readers of one body must never see two things: duplicate keys, NaN, and bytes that are no UTF-8 are
refused, and so are halves of surrogate pairs and numbers beyond double precision, which nobody could write
down again, and nesting that would exhaust a parser.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from services.common.errors import ArgumentInvalid, MessageTooLarge

# A prompt of 1 MiB, with room for JSON's escapes.
BODY_BYTES_MAX = 2 << 20
# The API's own objects are four levels deep.
DEPTH_MAX = 32

# A conversation of a thousand turns with tools has some thousands. Each costs a hundred times the two bytes
# that spell it.
NODES_MAX = 1 << 16

# Strings are skipped whole, so that brackets inside them do not count, and runs of them at once. Nothing is
# tried twice, and a string that never ends matches too: otherwise each quote inside it would be tried as the
# beginning of another.
_STRINGS = re.compile(rb'(?:"(?:[^"\\]++|\\.)*+"?[^"\[\]{}]*+)++', re.DOTALL)
_AS_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

# Only an escape can spell one: UTF-8 has none.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in `body`.

    Raises:
        MessageTooLarge: It is longer than the server reads.
        ArgumentInvalid: It is not exactly one JSON object.
    """
    if len(body) > BODY_BYTES_MAX:
        raise MessageTooLarge(f"The body has {len(body)} bytes; at most {BODY_BYTES_MAX} are read.")
    if not body.strip():
        raise ArgumentInvalid("The body is empty; send a JSON object.")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise ArgumentInvalid("The body is not UTF-8 text.") from None
    _check_nesting(body)
    value, is_finite = _parsed(text)
    if not isinstance(value, dict):
        raise ArgumentInvalid("The body is JSON, but not an object; send {...}.")
    if _SURROGATE.search(text):
        _check_halves(value)
    if not is_finite:
        _check_finite(value)
    return value


def _parsed(text: str) -> tuple[Any, bool]:
    """What a JSON text says, and whether every number in it is finite."""
    is_finite = True

    def read_float(digits: str) -> float:
        nonlocal is_finite
        number = float(digits)
        is_finite = is_finite and math.isfinite(number)
        return number

    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=read_float
        )
    except json.JSONDecodeError as error:
        raise ArgumentInvalid(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except (ValueError, RecursionError):
        # A whole number of thousands of digits.
        raise ArgumentInvalid("The body is not JSON that this server reads.") from None
    return value, is_finite


def _check_nesting(body: bytes) -> None:
    """Refuses what nests too deeply or holds too much. There is no loop over brackets: a body has many."""
    if body.count(b"[") + body.count(b"{") <= DEPTH_MAX:
        return
    brackets = _STRINGS.sub(b"", body).translate(_AS_BRACKETS, _NO_BRACKETS)
    nodes = brackets.count(b"[")
    for _ in range(DEPTH_MAX):
        # Without the innermost pairs it is one level less deep; of what is well-formed nothing is left.
        brackets, before = brackets.replace(b"[]", b""), len(brackets)
        if len(brackets) == before:
            break
    if b"[]" in brackets or brackets.count(b"[") > DEPTH_MAX:
        raise ArgumentInvalid(f"The body is nested deeper than {DEPTH_MAX} levels.")
    if nodes > NODES_MAX:
        raise ArgumentInvalid(f"The body has more than {NODES_MAX} arrays and objects.")


def _check_halves(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ArgumentInvalid(
                f"{shown(name)}: is not valid Unicode text; it has half of a surrogate pair."
            ) from None


def _check_finite(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ArgumentInvalid(
                f"{shown(name)}: has a number that is out of range; at most {sys.float_info.max:.1e} is read."
            ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ArgumentInvalid(f"{shown(key)}: is given twice.")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ArgumentInvalid(f"The body is not JSON: {name} is not a JSON value.")


def shown(key: str) -> str:
    """A caller's key as it may stand in a message: short, and without control characters."""
    return ascii(key[:64])[1:-1]
