"""The fields of a native HTTP request. Owns: their JSON types, one by one, and how a mistake is told.

Must not know: the bounds of their values; `core.validation` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid
from services.common.strict_json import shown
from services.gateway.core.jobs import Band
from services.gateway.core.params import FormatKind, OutputFormat


def read_text(name: str, value: Any) -> str:
    """A text. Raises ArgumentInvalid for anything else."""
    if not isinstance(value, str):
        raise ArgumentInvalid(f"{name}: must be a text.")
    return value


def read_boolean(name: str, value: Any) -> bool:
    """True or false. Raises ArgumentInvalid for anything else."""
    if not isinstance(value, bool):
        raise ArgumentInvalid(f"{name}: must be true or false.")
    return value


def read_integer(name: str, value: Any) -> int:
    """A whole number. Raises ArgumentInvalid for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentInvalid(f"{name}: must be a whole number.")
    return value


def read_int32(name: str, value: Any) -> int:
    """A whole number of 32 bits. Raises ArgumentInvalid for anything else."""
    number = read_integer(name, value)
    if not -(2**31) <= number < 2**31:
        raise ArgumentInvalid(f"{name}: is out of range.")
    return number


def read_number(name: str, value: Any) -> float:
    """A number. Raises ArgumentInvalid for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentInvalid(f"{name}: must be a number.")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentInvalid(f"{name}: is out of range.") from None


def read_array(name: str, value: Any) -> list[Any]:
    """An array. Raises ArgumentInvalid for anything else."""
    if not isinstance(value, list):
        raise ArgumentInvalid(f"{name}: must be an array.")
    return value


def read_stop(name: str, value: Any) -> tuple[str, ...]:
    """One text, or an array of them. Raises ArgumentInvalid for anything else."""
    texts = [value] if isinstance(value, str) else read_array(name, value)
    return tuple(read_text(f"{name}[{at}]", text) for at, text in enumerate(texts))


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids. Raises ArgumentInvalid for anything else."""
    token_ids = read_array(name, value)
    # Names are made for mistakes alone: a body has room for a million ids.
    for at, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise ArgumentInvalid(f"{name}[{at}]: must be a token id.")
    return tuple(token_ids)


def read_messages(name: str, value: Any) -> tuple[Message, ...]:
    """The turns of a conversation. Raises ArgumentInvalid for anything else."""
    return tuple(_message(f"{name}[{at}]", turn) for at, turn in enumerate(read_array(name, value)))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise ArgumentInvalid(f"{name}: must be an object.")
    for key in value:
        if key not in {"role", "content"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of a message.")
    for key in ("role", "content"):
        if key not in value:
            raise ArgumentInvalid(f"{name}.{key}: is missing.")
    return Message(read_text(f"{name}.role", value["role"]), read_text(f"{name}.content", value["content"]))


def read_priority(name: str, value: Any) -> int:
    """The name of a band. Raises ArgumentInvalid for anything else."""
    names = {band.name.lower(): band.value for band in Band}
    text = read_text(name, value)
    if text not in names:
        raise ArgumentInvalid(f"{name}: must be one of {', '.join(names)}.")
    return names[text]


def read_map(name: str, value: Any) -> dict[str, Any]:
    """An object. Raises ArgumentInvalid for anything else."""
    if not isinstance(value, dict):
        raise ArgumentInvalid(f"{name}: must be an object.")
    return value


def read_logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Biases by token id. Raises ArgumentInvalid for anything else."""
    entries = read_map(name, value).items()
    return tuple(sorted((_bias_id(name, key), read_number(f"{name}.{key}", bias)) for key, bias in entries))


def _bias_id(name: str, key: str) -> int:
    """A token id as JSON's keys spell it: one spelling an id, so that none can come twice."""
    if not (key.isascii() and key.isdecimal() and len(key) <= 10 and str(int(key)) == key):
        raise ArgumentInvalid(f"{name}.{shown(key)}: must be a token id.")
    if int(key) >= 2**32:
        raise ArgumentInvalid(f"{name}.{key}: must be a token id.")
    return int(key)


def read_format(name: str, value: Any) -> OutputFormat:
    """A shape of the output. Raises ArgumentInvalid for anything else."""
    fields = read_map(name, value)
    kinds = ", ".join(FormatKind)
    if len(fields) != 1 or next(iter(fields)) not in set(FormatKind):
        raise ArgumentInvalid(f"{name}: must have exactly one of {kinds}.")
    ((key, shape),) = fields.items()
    kind = FormatKind(key)
    name = f"{name}.{key}"
    match kind:
        case FormatKind.CHOICE:
            choices = read_array(name, shape)
            return OutputFormat(
                kind, tuple(read_text(f"{name}[{at}]", text) for at, text in enumerate(choices))
            )
        case FormatKind.JSON_SCHEMA:
            return OutputFormat(kind, (read_schema(name, shape),))
        case _:
            return OutputFormat(kind, (read_text(name, shape),))


def read_schema(name: str, value: Any) -> str:
    """A schema as it stands in the body, or as JSON text; the order of its properties is kept."""
    if isinstance(value, str):
        return value
    return json.dumps(read_map(name, value), ensure_ascii=False, separators=(",", ":"))


def given(fields: Mapping[str, Any], name: str, where_absent: Any) -> Any:
    """A field as it was given; null says what leaving it out says, and no other value does."""
    value = fields.get(name)
    return where_absent if value is None else value


def refuse_others(name: str, fields: Mapping[str, Any], allowed: Collection[str], of: str = "it") -> None:
    """Raises ArgumentInvalid for a field that is neither allowed nor null."""
    for key, value in fields.items():
        # The vendors' clients send what they read, with each field that they know; null says nothing.
        if key not in allowed and value is not None:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of {of}.")


def ignore(name: str, value: Any) -> None:
    """Anything: a field that changes nothing which could be promised."""
    del name, value


FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "request_id": read_text,
    "model": read_text,
    "text": read_text,
    "messages": read_messages,
    "tokens": read_token_ids,
    "max_tokens": read_int32,
    "temperature": read_number,
    "top_p": read_number,
    "top_k": read_int32,
    "min_p": read_number,
    "repetition_penalty": read_number,
    "presence_penalty": read_number,
    "frequency_penalty": read_number,
    "seed": read_integer,
    "logit_bias": read_logit_bias,
    "stop": read_stop,
    "logprobs": read_int32,
    "n": read_int32,
    "format": read_format,
    "priority": read_priority,
    "resumable": read_boolean,
    "stream": read_boolean,
}
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
)
