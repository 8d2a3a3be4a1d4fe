"""The fields of an OpenAI request. Owns: what each means here, and which are refused by name.

Fields that change nothing that could be promised (`user`, `metadata`, `store`) are accepted. What messages
say: `openai_messages`.
Must not know: the bounds of values; `core.validation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, FeatureUnsupported
from services.common.strict_json import read_object, shown
from services.gateway.core.params import (
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    Prompt,
    RawPrompt,
    SamplingParams,
    TokenPrompt,
)
from services.gateway.http import native_fields, openai_messages, tool_calls, tool_schemas, vendor_fields
from services.gateway.http.native import check_json_type
from services.gateway.http.told_calls import read_name
from services.gateway.http.tool_calls import Tool

# What an absent `max_tokens` means in this API, where the context leaves as many.
TOKENS_WHERE_ABSENT = 1_024


@dataclass(frozen=True, slots=True)
class OpenAiRequest:
    """What was posted.

    Attributes:
        generation: The request itself.
        stream: Whether chunks are wanted rather than one body.
        usage: Whether a stream tells the usage at its end.
        tools: The names of the functions that the model may call.
        bare: Whether a call is all of the answer, without marks.
        single: Whether it may call no more than one.
        echo: What is said again before the completion of a text.
        names: What fields are called here, by their names inside.
    """

    generation: GenerationRequest
    stream: bool = False
    usage: bool = False
    tools: frozenset[str] = frozenset()
    bare: bool = False
    single: bool = False
    echo: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.generation.n or 1


def read_chat(body: bytes, content_type: str) -> OpenAiRequest:
    """Returns what a body of `/v1/chat/completions` asks for.

    Raises:
        MessageTooLarge: The body is longer than the server reads.
        ArgumentInvalid: It is not JSON, or a field is unknown, missing or of the wrong type.
        FeatureUnsupported: A field is known and not served.
    """
    read = _read(body, content_type, CHAT_FIELDS, _CHAT_REFUSED, ("model", "messages"))
    tools, forced = tool_calls.chosen(read.get("tools", ()), read.get("tool_choice", "auto"))
    form = read.get("response_format")
    # What is held to a schema has no room for marks.
    bare = bool(tools) and (forced or form is not None)
    turns: list[Message] = list(read["messages"])
    if tools:
        turns = tool_calls.instructed(turns, tools, bare=bare)
    logprobs = read.get("top_logprobs", 0) if read.get("logprobs") else None
    if logprobs is None and "top_logprobs" in read:
        raise ArgumentInvalid("top_logprobs: needs logprobs to be true.")
    if bare:
        form = tool_schemas.call_format(tools, None if forced else form)
    max_tokens = read.get("max_completion_tokens", read.get("max_tokens"))
    generation = _generation(read, ChatPrompt(tuple(turns)), max_tokens, logprobs, form)
    return OpenAiRequest(
        generation,
        stream=read.get("stream", False),
        usage=read.get("stream_options", False),
        tools=frozenset(tool.name for tool in tools),
        bare=bare,
        single=not read.get("parallel_tool_calls", True),
        names={
            "format.json_schema": tool_schemas.blamed(
                "response_format.json_schema.schema", forced=forced, bare=bare
            ),
            "logprobs": "top_logprobs",
            "max_tokens": "max_completion_tokens" if "max_completion_tokens" in read else "max_tokens",
        },
    )


def read_completion(body: bytes, content_type: str) -> OpenAiRequest:
    """Returns what a body of `/v1/completions` asks for; raises as `read_chat`."""
    read = _read(body, content_type, TEXT_FIELDS, _TEXT_REFUSED, ("model", "prompt"))
    prompt: Prompt = read["prompt"]
    # This API generates 16 tokens where nothing is said.
    generation = _generation(read, prompt, read.get("max_tokens", 16), read.get("logprobs"), None)
    if read.get("best_of", read.get("n", 1)) != read.get("n", 1):
        raise FeatureUnsupported("best_of: is served where it equals n.")
    if read.get("echo") and not isinstance(prompt, RawPrompt):
        raise FeatureUnsupported("echo: is served for a prompt that is text.")
    if read.get("echo") and "logprobs" in read:
        # Workers have none of a prompt. Callers sum what they get of both, and without them the sum is wrong.
        raise FeatureUnsupported(
            "echo: is not served with logprobs, for a prompt has none here; leave one of the two out."
        )
    echo = prompt.text if read.get("echo") and isinstance(prompt, RawPrompt) else ""
    return OpenAiRequest(
        generation,
        stream=read.get("stream", False),
        usage=read.get("stream_options", False),
        echo=echo,
        names={"text": "prompt", "tokens": "prompt"},
    )


def _generation(
    read: Mapping[str, Any],
    prompt: Prompt,
    max_tokens: int | None,
    logprobs: int | None,
    form: OutputFormat | None,
) -> GenerationRequest:
    # The vendor samples at 1 where nothing is said.
    sampling = {"temperature": 1.0} | {
        name: read[name] for name in native_fields.SAMPLING_FIELDS if name in read
    }
    return GenerationRequest(
        model=read["model"],
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(**sampling),
        stop=read.get("stop", ()),
        logprobs=logprobs,
        n=read.get("n"),
        form=form,
        tokens_where_absent=TOKENS_WHERE_ABSENT,
    )


def _read(
    body: bytes,
    content_type: str,
    known: Mapping[str, Callable[[str, Any], Any]],
    refused: frozenset[str],
    needed: tuple[str, ...],
) -> dict[str, Any]:
    check_json_type(content_type)
    read = {}
    for name, value in read_object(body).items():
        # JSON's null says what leaving the field out says.
        if value is None:
            continue
        if name in refused:
            raise FeatureUnsupported(f"{name}: is not served here.")
        if name not in known:
            raise ArgumentInvalid(f"{shown(name)}: is not a field of this request.")
        read[name] = known[name](name, value)
    for name in needed:
        if name not in read:
            raise ArgumentInvalid(f"{name}: is missing.")
    return read


def _prompt(name: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return RawPrompt(value)
    entries = native_fields.read_array(name, value)
    if len(entries) == 1 and isinstance(entries[0], str | list):
        return _prompt(f"{name}[0]", entries[0])
    if entries and not all(type(entry) is int for entry in entries):
        raise FeatureUnsupported(f"{name}: one text, or one array of token ids, is served at a time.")
    return TokenPrompt(native_fields.read_token_ids(name, entries))


def _response_format(name: str, value: Any) -> OutputFormat | None:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind == "text":
        return None
    if kind == "json_object":
        return OutputFormat(FormatKind.JSON_SCHEMA, ('{"type":"object"}',))
    if kind != "json_schema":
        raise ArgumentInvalid(f"{name}.type: must be text, json_object or json_schema.")
    form = native_fields.read_map(f"{name}.json_schema", fields.get("json_schema"))
    native_fields.read_text(f"{name}.json_schema.name", form.get("name"))
    schema = native_fields.given(form, "schema", {"type": "object"})
    return OutputFormat(
        FormatKind.JSON_SCHEMA, (native_fields.read_schema(f"{name}.json_schema.schema", schema),)
    )


def _tools(name: str, value: Any) -> tuple[Tool, ...]:
    return tool_calls.read_tools(name, value, _tool)


def _tool(name: str, value: Any) -> Tool:
    fields = native_fields.read_map(name, value)
    kind = native_fields.read_text(f"{name}.type", fields.get("type"))
    if kind != "function":
        raise FeatureUnsupported(f"{name}.type: tools of type {shown(kind)} are not served here.")
    function = native_fields.read_map(f"{name}.function", fields.get("function"))
    description = native_fields.given(function, "description", "")
    parameters = native_fields.given(function, "parameters", {})
    return Tool(
        read_name(f"{name}.function.name", function.get("name")),
        native_fields.read_text(f"{name}.function.description", description),
        native_fields.read_map(f"{name}.function.parameters", parameters),
    )


def _tool_choice(name: str, value: Any) -> str:
    if isinstance(value, str):
        if value not in {"auto", "none", "required"}:
            raise ArgumentInvalid(f"{name}: must be auto, none, required, or a function.")
        return value
    fields = native_fields.read_map(name, value)
    if fields.get("type") != "function":
        raise FeatureUnsupported(f"{name}.type: only function is served here.")
    function = native_fields.read_map(f"{name}.function", fields.get("function"))
    return "function:" + native_fields.read_text(f"{name}.function.name", function.get("name"))


def _stream_options(name: str, value: Any) -> bool:
    fields = native_fields.read_map(name, value)
    for key in fields:
        if key not in {"include_usage", "include_obfuscation"}:
            raise ArgumentInvalid(f"{name}.{shown(key)}: is not a field of it.")
    include = fields.get("include_usage")
    return include is not None and native_fields.read_boolean(f"{name}.include_usage", include)


def _modalities(name: str, value: Any) -> None:
    for at, kind in enumerate(native_fields.read_array(name, value)):
        if native_fields.read_text(f"{name}[{at}]", kind) != "text":
            raise FeatureUnsupported(f"{name}[{at}]: only text is served here.")


def _zero_seed(name: str, value: Any) -> int:
    """The vendor's seeds are signed; each of them names a seed of its own here."""
    number = native_fields.read_integer(name, value)
    return number % 2**64 if -(2**63) <= number < 2**63 else number


def _top_k(name: str, value: Any) -> int | None:
    """Other servers of this API read -1 as they read 0: every token is kept."""
    number = vendor_fields.read_top_k(name, value)
    return None if number == -1 else number


_SHARED_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": native_fields.read_text,
    "max_tokens": native_fields.read_int32,
    "temperature": native_fields.read_number,
    "top_p": vendor_fields.read_top_p,
    # The vendor has not these three; code for other servers of its API sends them beside the others.
    "top_k": _top_k,
    "min_p": native_fields.read_number,
    "repetition_penalty": native_fields.read_number,
    "presence_penalty": native_fields.read_number,
    "frequency_penalty": native_fields.read_number,
    "seed": _zero_seed,
    "logit_bias": native_fields.read_logit_bias,
    "stop": native_fields.read_stop,
    "n": native_fields.read_int32,
    "stream": native_fields.read_boolean,
    "stream_options": _stream_options,
    "user": native_fields.ignore,
}

CHAT_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    **_SHARED_FIELDS,
    "messages": openai_messages.read_messages,
    "max_completion_tokens": native_fields.read_int32,
    "logprobs": native_fields.read_boolean,
    "top_logprobs": native_fields.read_int32,
    "response_format": _response_format,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": native_fields.read_boolean,
    "modalities": _modalities,
    **dict.fromkeys(
        (
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            # Hints to other models, and a guess that only saves time.
            "reasoning_effort",
            "verbosity",
            "prediction",
        ),
        native_fields.ignore,
    ),
}
_CHAT_REFUSED = frozenset({"audio", "functions", "function_call", "web_search_options", "moderation"})

TEXT_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    **_SHARED_FIELDS,
    "prompt": _prompt,
    "logprobs": native_fields.read_int32,
    "echo": native_fields.read_boolean,
    "best_of": native_fields.read_int32,
}
_TEXT_REFUSED = frozenset({"suffix"})
