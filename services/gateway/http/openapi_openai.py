"""The OpenAI paths of `/openapi.json`. Owns: what of the vendor's API is taken here, and what is answered.

A field that the vendor knows and that is refused by name is not described.
"""

from __future__ import annotations

from typing import Any

from services.gateway.http import openai_fields, responses_fields
from services.gateway.http.openapi_parts import (
    BOOLEAN,
    COUNT,
    FUNCTION_NAME,
    NULL,
    OBJECT,
    TEXT,
    TOKEN_ID,
    VENDOR_ERRORS,
    VENDOR_TOP_K,
    VENDOR_TOP_P,
    Schema,
    any_of,
    array,
    body,
    closed,
    nullable,
    operation,
    ref,
    with_optional,
)
from services.gateway.http.tool_calls import TOOLS_MAX

_NUMBER: Schema = {"type": "number"}
_PROMPT: Schema = {"type": "string", "minLength": 1}
# The vendor's are signed; each of them is one here as well.
_SEED: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
_SAMPLED: dict[str, Schema] = {
    "seed": _SEED,
    "top_p": VENDOR_TOP_P,
    # Other servers of this API have -1 for all.
    "top_k": VENDOR_TOP_K | {"minimum": -1},
}
_FUNCTION: Schema = {"const": "function"}
_NAMED = closed(name=TEXT)
_DEFINED = with_optional(
    closed(name=FUNCTION_NAME),
    description=nullable(TEXT),
    parameters=nullable(OBJECT),
    strict=nullable(BOOLEAN),
)
# What more it says is the vendor's.
_DIRECT: Schema = {"type": "object", "properties": {"type": {"const": "direct"}}, "required": ["type"]}
_MODES: Schema = {"enum": ["auto", "none", "required"]}
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}


def paths() -> dict[str, Any]:
    """The paths that no other vendor has as well."""
    return {
        "/v1/chat/completions": _post("createChatCompletion", "Goes on with a conversation.", "OpenAiChat"),
        "/v1/completions": _post("createCompletion", "Goes on with a text.", "OpenAiText"),
        "/v1/responses": _post("createResponse", "Answers what is put in.", "OpenAiResponse"),
    }


def schemas() -> dict[str, Any]:
    """What the paths take and answer, by name."""
    return {
        "OpenAiChatRequest": _chat_request(),
        "OpenAiChat": _chat(),
        "OpenAiTextRequest": _text_request(),
        "OpenAiText": _text(),
        "OpenAiResponseRequest": _response_request(),
        "OpenAiResponse": _response(),
        "OpenAiModel": closed(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT),
        "OpenAiModels": closed(object={"const": "list"}, data=array(ref("OpenAiModel"))),
        "OpenAiError": closed(
            error=closed(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT))
        ),
    }


def _post(name: str, summary: str, result: str) -> dict[str, Any]:
    posted, error = ref(f"{result}Request"), ref("OpenAiError")
    return {"post": operation(name, summary, ref(result), VENDOR_ERRORS, error, posted=posted, streams=True)}


# --- chat ---------------------------------------------------------------------------------------------------


def _chat_request() -> dict[str, Any]:
    function = closed(type=_FUNCTION, function=_DEFINED)
    own = {
        "messages": array(_turn()) | {"minItems": 1},
        "stream_options": _stream_options(),
        "response_format": _form(closed(type={"const": "json_schema"}, json_schema=_json_schema())),
        "tools": array(function) | {"maxItems": TOOLS_MAX},
        "tool_choice": any_of(_MODES, closed(type=_FUNCTION, function=_NAMED)),
        **_SAMPLED,
        "modalities": array({"const": "text"}),
    }
    return body(openai_fields.CHAT_FIELDS, "model", "messages", own=own)


def _turn() -> dict[str, Any]:
    parts = any_of(closed(type={"const": "text"}, text=TEXT), closed(type={"const": "refusal"}, refusal=TEXT))
    content = any_of(TEXT, array(parts))
    turn = closed(role={"enum": ["system", "developer", "user", "function"]}, content=content)
    said = closed(role={"const": "assistant"}, content=content)
    result = closed(role={"const": "tool"}, content=content, tool_call_id=TEXT)
    refused = closed(role={"const": "assistant"}, refusal=TEXT)
    told: dict[str, Schema] = {"name": {}, "refusal": {}, "annotations": {}}
    more = {**told, "tool_call_id": {}}
    called = closed(function=closed(name=FUNCTION_NAME, arguments=TEXT), id=TEXT, type=_FUNCTION)
    calls = closed(role={"const": "assistant"}, tool_calls=array(called) | {"minItems": 1})
    return any_of(
        with_optional(turn, **more),
        with_optional(result, **told),
        with_optional(said, parsed={}, **more),
        with_optional(calls, content=nullable(TEXT), parsed={}, **more),
        with_optional(refused, content=NULL, name={}, annotations={}, parsed={}),
    )


def _json_schema() -> dict[str, Any]:
    return with_optional(
        _NAMED, schema=nullable(OBJECT), description=nullable(TEXT), strict=nullable(BOOLEAN)
    )


def _form(own: Schema) -> dict[str, Any]:
    """What the output may be held to."""
    return any_of(closed(type={"enum": ["text", "json_object"]}), own)


def _stream_options() -> dict[str, Any]:
    return with_optional(closed(), include_usage=nullable(BOOLEAN), include_obfuscation={})


def _chat() -> dict[str, Any]:
    called = closed(id=TEXT, type=_FUNCTION, function=closed(name=TEXT, arguments=TEXT))
    message = closed(role={"const": "assistant"}, content=nullable(TEXT), refusal=NULL, annotations=array({}))
    scored = closed(token=TEXT, logprob=_NUMBER, bytes=array(COUNT))
    score = closed(token=TEXT, logprob=_NUMBER, bytes=array(COUNT), top_logprobs=array(scored))
    choice = closed(
        index=COUNT,
        message=with_optional(message, tool_calls=array(called)),
        logprobs=nullable(closed(content=array(score), refusal=NULL)),
        finish_reason=_FINISH,
    )
    return _completion("chat.completion", choice)


# --- completions --------------------------------------------------------------------------------------------


def _text_request() -> dict[str, Any]:
    ids = array(TOKEN_ID) | {"minItems": 1}
    own = {
        "prompt": any_of(_PROMPT, ids, array(any_of(_PROMPT, ids)) | {"minItems": 1, "maxItems": 1}),
        "stream_options": _stream_options(),
        **_SAMPLED,
    }
    return body(openai_fields.TEXT_FIELDS, "model", "prompt", own=own)


def _text() -> dict[str, Any]:
    scores = closed(
        tokens=array(TEXT),
        token_logprobs=array(_NUMBER),
        top_logprobs=array({"type": "object", "additionalProperties": _NUMBER}),
        text_offset=array(COUNT),
    )
    choice = closed(index=COUNT, text=TEXT, logprobs=nullable(scores), finish_reason=_FINISH)
    return _completion("text_completion", choice)


def _completion(kind: str, choice: Schema) -> dict[str, Any]:
    usage = closed(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=closed(cached_tokens=COUNT, audio_tokens=COUNT),
        completion_tokens_details=closed(
            reasoning_tokens=COUNT,
            audio_tokens=COUNT,
            accepted_prediction_tokens=COUNT,
            rejected_prediction_tokens=COUNT,
        ),
    )
    return closed(
        id=TEXT,
        object={"const": kind},
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=array(choice) | {"minItems": 1},
        usage=usage,
    )


# --- responses ----------------------------------------------------------------------------------------------


def _response_request() -> dict[str, Any]:
    tool = with_optional(
        closed(type=_FUNCTION, name=FUNCTION_NAME),
        description=nullable(TEXT),
        parameters=nullable(OBJECT),
        strict=nullable(BOOLEAN),
        defer_loading={"enum": [False, None]},
        allowed_callers=nullable(array(TEXT) | {"contains": {"const": "direct"}}),
        output_schema={},
        **{"async": {"enum": [False, None]}},
    )
    named = with_optional(closed(type={"const": "json_schema"}, name=TEXT, schema=OBJECT), strict={})
    own = {
        "input": any_of(TEXT, array(any_of(*_items())) | {"minItems": 1}),
        "text": with_optional(closed(), format=nullable(_form(named)), verbosity={}),
        "tools": array(tool) | {"maxItems": TOOLS_MAX},
        "tool_choice": any_of(_MODES, closed(type=_FUNCTION, name=TEXT)),
        "include": array(TEXT),
        "top_p": VENDOR_TOP_P,
    }
    return body(responses_fields.FIELDS, "model", "input", own=own)


def _items() -> tuple[Schema, ...]:
    """What a conversation is made of."""
    part = with_optional(
        closed(type={"enum": ["input_text", "output_text", "text"]}, text=TEXT), annotations={}, logprobs={}
    )
    content = any_of(TEXT, array(part))
    more: dict[str, Schema] = {"id": {}, "status": {}}
    direct = {**more, "namespace": {}, "caller": nullable(_DIRECT)}
    roles = {"enum": ["user", "assistant", "system", "developer"]}
    message = closed(role=roles, content=content)
    call = closed(type={"const": "function_call"}, call_id=TEXT, name=FUNCTION_NAME, arguments=TEXT)
    result = closed(type={"const": "function_call_output"}, call_id=TEXT, output=content)
    return (
        with_optional(message, type={"const": "message"}, phase={}, **more),
        with_optional(call, **direct, **{"async": {}}),
        with_optional(result, name={}, **direct),
    )


def _response() -> dict[str, Any]:
    status: Schema = {"enum": ["completed", "incomplete"]}
    usage = closed(
        input_tokens=COUNT,
        input_tokens_details=closed(cached_tokens=COUNT),
        output_tokens=COUNT,
        output_tokens_details=closed(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    )
    return closed(
        id=TEXT,
        object={"const": "response"},
        created_at=COUNT,
        status=status,
        background={"const": False},
        error=NULL,
        incomplete_details=nullable(closed(reason={"const": "max_output_tokens"})),
        model=TEXT,
        output=array(any_of(*_outputs(status))),
        previous_response_id=NULL,
        reasoning=closed(effort=NULL, summary=NULL),
        truncation={"const": "disabled"},
        usage=usage,
        **_repeated(),
    )


def _outputs(status: Schema) -> tuple[Schema, ...]:
    """What an answer is made of."""
    part = closed(type={"const": "output_text"}, text=TEXT, annotations=array({}), logprobs=array({}))
    message = closed(
        id=TEXT, type={"const": "message"}, status=status, role={"const": "assistant"}, content=array(part)
    )
    call = closed(
        id=TEXT,
        type={"const": "function_call"},
        status={"const": "completed"},
        call_id=TEXT,
        name=TEXT,
        arguments=TEXT,
    )
    return message, call


def _repeated() -> dict[str, Schema]:
    """What a response says again of its request."""
    tool = closed(
        type=_FUNCTION,
        name=TEXT,
        description=nullable(TEXT),
        parameters=nullable(OBJECT),
        strict=BOOLEAN,
    )
    return {
        "instructions": nullable(TEXT),
        "max_output_tokens": nullable({"type": "integer"}),
        "metadata": OBJECT,
        "parallel_tool_calls": BOOLEAN,
        "store": BOOLEAN,
        "temperature": _NUMBER,
        "text": OBJECT,
        "tool_choice": any_of(_MODES, closed(type=_FUNCTION, name=TEXT)),
        "tools": array(tool),
        "top_p": _NUMBER,
    }
