"""What may be asked. Owns: the documented bound of every field, and how a breach is told.

Pure checks on what a caller sent; the same for gRPC and HTTP.
"""

from __future__ import annotations

import json
import math

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, ContextExceeded, ScopeMissing
from services.common.ids import is_valid_id
from services.common.sampling_bounds import REPETITION_PENALTY_MIN
from services.gateway.core.jobs import Band, Principal
from services.gateway.core.params import (
    MAX_TOKENS_DEFAULT,
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    Prompt,
    RawPrompt,
    SamplingParams,
    TextPrompt,
)

# Stop strings where an API's vendor names no bound: each piece of text is compared with all of them.
UNBOUNDED_STOPS_MAX = 64
STOP_BYTES_MAX = 256
MESSAGES_MAX = 1_024
ROLE_BYTES_MAX = 64
# The largest contexts served hold about 100,000 tokens of 4 to 5 bytes. More cannot fit, and would only
# occupy the tokenizer for seconds.
PROMPT_BYTES_MAX = 1 << 20

BIASES_MAX = 1_024
BIAS_MAX = 100.0
LOGPROBS_MAX = 20
SEQUENCES_MAX = 4
# Scores of all tokens of a request, alternatives included: some 20 MB of JSON, and as much in memory.
SCORES_MAX = 1 << 18
CHOICES_MAX = 256
# Bytes of each text of a format: what a worker compiles within its bound on time.
FORMAT_BYTES_MAX = {
    FormatKind.JSON_SCHEMA: 64 * 1024,
    FormatKind.REGEX: 4 * 1024,
    FormatKind.CHOICE: 1024,
    FormatKind.GRAMMAR: 64 * 1024,
}

# (field, lowest, whether the lowest itself is allowed, highest)
RANGES: tuple[tuple[str, float, bool, float], ...] = (
    ("temperature", 0.0, True, 2.0),
    ("top_p", 0.0, False, 1.0),
    ("min_p", 0.0, True, 1.0),
    ("repetition_penalty", REPETITION_PENALTY_MIN, True, 10.0),
    ("presence_penalty", -2.0, True, 2.0),
    ("frequency_penalty", -2.0, True, 2.0),
)

PRIORITY_SCOPE = "priority:system"


def check_request(request: GenerationRequest) -> Prompt:
    """Checks everything that needs no tokenizer; returns the prompt, which is there.

    Raises:
        ArgumentInvalid: A field is missing or out of its bounds; the message begins with its name.
    """
    if request.request_id is not None:
        check_request_id(request.request_id)
    check_max_tokens(request.max_tokens)
    check_sampling(request.sampling)
    check_stop(request.stop, request.stops_max)
    check_format(request.form)
    _check_numbers(request)
    return check_prompt(request.prompt)


def check_request_id(request_id: str) -> None:
    """Raises ArgumentInvalid unless the id is well-formed."""
    if not is_valid_id(request_id):
        raise ArgumentInvalid("request_id: 1 to 64 of the characters A-Z a-z 0-9 . _ - are allowed.")


def check_max_tokens(max_tokens: int | None) -> None:
    """Raises ArgumentInvalid for zero and below."""
    if max_tokens is not None and max_tokens < 1:
        raise ArgumentInvalid(f"max_tokens: {max_tokens} is below 1.")


def check_prompt(prompt: Prompt | None) -> Prompt:
    """Returns the prompt; raises ArgumentInvalid when it is missing, empty or too large."""
    if prompt is None:
        raise ArgumentInvalid("text, chat or tokens: exactly one of them is needed.")
    if isinstance(prompt, TextPrompt | RawPrompt):
        _check_text("text", prompt.text)
        if not prompt.text:
            raise ArgumentInvalid("text: is empty.")
    elif isinstance(prompt, ChatPrompt):
        _check_messages(prompt.messages)
    elif not prompt.ids:
        raise ArgumentInvalid("tokens: at least one id is needed.")
    return prompt


def check_turns(turns: int) -> None:
    """Raises ArgumentInvalid for no turn, or too many.

    Numbers alone, as in the three that follow, so that a face can ask before it reads so many one by one.
    """
    if not 1 <= turns <= MESSAGES_MAX:
        raise ArgumentInvalid(f"messages: 1 to {MESSAGES_MAX} are allowed.")


def check_biases(biases: int) -> None:
    """Raises ArgumentInvalid for too many entries."""
    if biases > BIASES_MAX:
        raise ArgumentInvalid(f"logit_bias: at most {BIASES_MAX} entries.")


def check_choices(choices: int) -> None:
    """Raises ArgumentInvalid for no choice, or too many."""
    if not 1 <= choices <= CHOICES_MAX:
        raise ArgumentInvalid(f"format.{FormatKind.CHOICE}: 1 to {CHOICES_MAX} choices are allowed.")


def check_stops(stops: int, most: int) -> None:
    """Raises ArgumentInvalid for too many stop strings."""
    if stops > most:
        raise ArgumentInvalid(f"stop: at most {most} strings.")


def check_sampling(sampling: SamplingParams) -> None:
    """Raises ArgumentInvalid for a number out of its range, NaN and infinity included."""
    for name, lowest, inclusive, highest in RANGES:
        value: float | None = getattr(sampling, name)
        if value is None:
            continue
        above = value >= lowest if inclusive else value > lowest
        if not (math.isfinite(value) and above and value <= highest):
            low = f"{lowest:g}" if inclusive else f"over {lowest:g}"
            raise ArgumentInvalid(f"{name}: must be {low} to {highest:g}.")
    if sampling.top_k is not None and not 1 <= sampling.top_k < 2**31:
        raise ArgumentInvalid("top_k: must be at least 1.")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise ArgumentInvalid("seed: must be an unsigned number of 64 bits.")
    check_biases(len(sampling.logit_bias))
    if not all(abs(bias) <= BIAS_MAX for _, bias in sampling.logit_bias):
        raise ArgumentInvalid(f"logit_bias: each must be -{BIAS_MAX:g} to {BIAS_MAX:g}.")


def check_format(form: OutputFormat | None) -> None:
    """Raises ArgumentInvalid for a format out of its bounds, or a schema that is not JSON.

    Whether it can be compiled is for a worker to say.
    """
    if form is None:
        return
    if form.kind is None:
        raise ArgumentInvalid("format: exactly one of json_schema, regex, choice, grammar is needed.")
    name, limit = f"format.{form.kind}", FORMAT_BYTES_MAX[form.kind]
    if form.kind is FormatKind.CHOICE:
        check_choices(len(form.texts))
    if any(not 1 <= _size(name, text) <= limit for text in form.texts):
        raise ArgumentInvalid(f"{name}: 1 to {limit} bytes are allowed.")
    if form.kind is FormatKind.JSON_SCHEMA:
        _check_schema(name, form.texts[0])


def check_stop(stop: tuple[str, ...], most: int) -> None:
    """Raises ArgumentInvalid for too many stop strings, or one that is empty or too long."""
    check_stops(len(stop), most)
    if any(not 1 <= _size("stop", text) <= STOP_BYTES_MAX for text in stop):
        raise ArgumentInvalid(f"stop: each string has 1 to {STOP_BYTES_MAX} bytes.")


def band_of(priority: int, principal: Principal) -> Band:
    """Returns the band of a `Priority`; 0 means INTERACTIVE.

    Raises:
        ArgumentInvalid: No such priority.
        ScopeMissing: SYSTEM without its scope.
    """
    if priority not in {0, *Band}:
        raise ArgumentInvalid("priority: BATCH, INTERACTIVE or SYSTEM.")
    band = Band(priority) if priority else Band.INTERACTIVE
    if band is Band.SYSTEM and PRIORITY_SCOPE not in principal.scopes:
        raise ScopeMissing(f"priority: SYSTEM needs the scope '{PRIORITY_SCOPE}'.")
    return band


def check_token_ids(ids: tuple[int, ...], vocabulary: int) -> None:
    """Raises ArgumentInvalid for an id that the model does not have."""
    if any(not 0 <= token_id < vocabulary for token_id in ids):
        raise ArgumentInvalid(f"tokens: ids are 0 to {vocabulary - 1}.")


def check_biased_ids(sampling: SamplingParams, vocabulary: int) -> None:
    """Raises ArgumentInvalid for a bias on an id that the model does not have."""
    if any(not 0 <= token_id < vocabulary for token_id, _ in sampling.logit_bias):
        raise ArgumentInvalid(f"logit_bias: ids are 0 to {vocabulary - 1}.")


def fit_max_tokens(
    max_tokens: int | None,
    prompt_tokens: int,
    context_tokens: int,
    where_absent: int = MAX_TOKENS_DEFAULT,
) -> int:
    """Returns how many tokens may be generated: what was asked for, or the default, or what is left.

    Raises:
        ContextExceeded: The prompt, or prompt and `max_tokens`, do not fit.
    """
    left = context_tokens - prompt_tokens
    if left < 1:
        raise ContextExceeded.by(
            f"The prompt has {prompt_tokens} tokens; the model's context holds {context_tokens}, "
            "the answer included.",
            prompt_tokens,
            None,
            context_tokens,
        )
    if max_tokens is None:
        return min(where_absent, left)
    if max_tokens > left:
        raise ContextExceeded.by(
            f"max_tokens: {max_tokens} is more than the {left} that a prompt of {prompt_tokens} tokens "
            f"leaves of a context of {context_tokens}.",
            prompt_tokens,
            max_tokens,
            context_tokens,
        )
    return max_tokens


def _check_messages(messages: tuple[Message, ...]) -> None:
    check_turns(len(messages))
    for at, message in enumerate(messages):
        if not 1 <= _size(f"messages[{at}].role", message.role) <= ROLE_BYTES_MAX:
            raise ArgumentInvalid(f"messages[{at}].role: 1 to {ROLE_BYTES_MAX} bytes.")
    if sum(_size("messages", message.content) for message in messages) > PROMPT_BYTES_MAX:
        raise ArgumentInvalid(f"messages: together at most {PROMPT_BYTES_MAX} bytes.")


def _check_text(name: str, text: str) -> None:
    if _size(name, text) > PROMPT_BYTES_MAX:
        raise ArgumentInvalid(f"{name}: at most {PROMPT_BYTES_MAX} bytes.")


def _size(name: str, text: str) -> int:
    """Bytes of `text` in UTF-8; half of a surrogate pair, which JSON can spell, is no text."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ArgumentInvalid(f"{name}: is not valid Unicode text.") from None


def _check_schema(name: str, text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise ArgumentInvalid(f"{name}: is not JSON, or nested too deeply.") from None
    if not isinstance(schema, dict | bool):
        raise ArgumentInvalid(f"{name}: must be a JSON object, or true or false.")


def _check_numbers(request: GenerationRequest) -> None:
    if request.n is not None and not 1 <= request.n <= SEQUENCES_MAX:
        raise ArgumentInvalid(f"n: 1 to {SEQUENCES_MAX} are allowed.")
    if request.logprobs is not None and not 0 <= request.logprobs <= LOGPROBS_MAX:
        raise ArgumentInvalid(f"logprobs: 0 to {LOGPROBS_MAX} are allowed.")
    if request.logprobs is not None:
        _check_scores(request, request.logprobs)


def _check_scores(request: GenerationRequest, alternatives: int) -> None:
    """Refuses what would be told of too many scores, an absent `max_tokens` at its most."""
    tokens = request.max_tokens or request.tokens_where_absent
    scores = (request.n or 1) * tokens * (1 + alternatives)
    if scores > SCORES_MAX:
        raise ArgumentInvalid(
            f"logprobs: n x max_tokens x (1 + alternatives) is {scores}, at most {SCORES_MAX} are told. "
            "Ask for fewer alternatives or tokens."
        )


def messages_of(prompt: TextPrompt | ChatPrompt) -> tuple[Message, ...]:
    """The conversation that a prompt means: a text is one user message."""
    return (Message("user", prompt.text),) if isinstance(prompt, TextPrompt) else prompt.messages
