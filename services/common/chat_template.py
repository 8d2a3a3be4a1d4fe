"""Chat templates. Owns: how a conversation becomes text, with bounds on time, size and reach.

Must not know: token ids. A template comes with a revision and is a program of somebody else's: it runs in
Jinja's immutable sandbox, in a thread, and is stopped when it takes too long or writes too much.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import markupsafe
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.common.template_bounds import PLAIN_MESSAGES_MAX, is_plain

# Templates in use take under a millisecond for each message, and a conversation has at most 1,024.
RENDER_LIMIT_S = 2.0
# Reading the processor's time costs as much as several lines of a template.
LINES_PER_LOOK = 16
# The prompt's bound is 1 MiB; a template adds its own words, some per message.
RENDERED_CHARS_MAX = 4 << 20
# The largest templates in use have about 20 KB.
TEMPLATE_CHARS_MAX = 256 << 10
# A template repeats a few characters to indent; one that builds megabytes is broken.
REPEATED_CHARS_MAX = 10_000
# Templates count turns; products of large numbers only take time, and take it in one uninterruptible call.
FACTOR_MAX = 10**9
INDENT_MAX = 16

# What templates in use do with text. The others (`format`, `ljust`, `zfill`, ...) make much of little.
_TEXT_METHODS = frozenset(
    """
    capitalize count endswith find index isalnum isalpha isdigit islower isspace istitle isupper join lower
    lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper
    """.split()  # noqa: SIM905 - thirty quoted words would fill the page
)
# Likewise of Jinja's own filters, and those that only serve HTML.
_FILTERS_REFUSED = ("center", "format", "indent", "pprint", "urlize", "wordwrap", "xmlattr", "filesizeformat")

# What Jinja names the code of a template that comes from no file.
_TEMPLATE_FILE = "<template>"
# Where every loop of a template is: in itself, or in what Jinja does for it.
_TEMPLATE_CODE = (_TEMPLATE_FILE, *(str(Path(str(one.__file__)).parent) for one in (jinja2, markupsafe)))

Trace = Callable[[FrameType, str, Any], Any]


class _Refused(Exception):
    """The template called `raise_exception`."""


class _TooLong(BaseException):
    """The template ran out of time. Not an Exception, so that no filter of its own can catch it."""


class _BoundedConcatenation(CodeGenerator):
    """Compiles `a ~ b` as a call that the sandbox sees."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """Writes a call of `_Sandbox.concatenate`."""
        self.write("environment.concatenate((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also keeps a few characters of template from filling the memory."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _BoundedConcatenation

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Leaves of a text's methods those that cannot blow it up."""
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leaves `str.format` to `is_safe_attribute`: the sandbox has its own, which is without bounds."""

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function for the template, `str.replace` with a bound on what comes out."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ == "replace":
            return _replaced(owner, *args, **kwargs)
        return super().call(context, function, *args, **kwargs)

    def concatenate(self, values: Sequence[Any]) -> str:
        """`a ~ b ~ c`."""
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > RENDERED_CHARS_MAX:
            raise jinja2.exceptions.SecurityError("the result of ~ is too large")
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Performs an operation whose result stays small."""
        numbers = all(isinstance(value, int | float) for value in (left, right))
        if operator == "+" and not numbers and _length(left) + _length(right) > RENDERED_CHARS_MAX:
            raise jinja2.exceptions.SecurityError("the result of + is too large")
        if operator == "*" and numbers and max(abs(left), abs(right)) > FACTOR_MAX:
            raise jinja2.exceptions.SecurityError("the operands of * are too large")
        if operator == "**" and (not numbers or abs(left) > 1_000 or abs(right) > 10):
            raise jinja2.exceptions.SecurityError("the operands of ** are too large")
        if operator == "*" and not numbers and not _repeats_little(left, right):
            raise jinja2.exceptions.SecurityError("the result of * is too large")
        if operator == "%" and isinstance(left, str):
            raise jinja2.exceptions.SecurityError("formatting with % is not available")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One model's template.

    Args:
        source: Its text.
        variables: What the tokenizer's configuration offers to it, such as `bos_token`.
        limit_s: How much processor time one rendering may take.

    Raises:
        ArtifactInvalid: It is too large, or no Jinja.
    """

    def __init__(self, source: str, variables: dict[str, str], *, limit_s: float = RENDER_LIMIT_S) -> None:
        if len(source) > TEMPLATE_CHARS_MAX:
            raise ArtifactInvalid(f"chat template: {len(source)} characters; at most {TEMPLATE_CHARS_MAX}.")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        for name in _FILTERS_REFUSED:
            environment.filters.pop(name, None)
        environment.filters["tojson"] = _to_json
        environment.filters["replace"] = _replaced
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        # What the template may not have: the names of Jinja's own helpers that make text from nothing.
        for name in ("lipsum", "cycler", "joiner"):
            environment.globals.pop(name, None)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ArtifactInvalid(f"chat template: not usable: {type(error).__name__}.") from None
        self._is_plain = is_plain(source, tree)
        self._variables = variables
        self._limit_s = limit_s

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the conversation as text, ready for the model's answer. Blocks; bounded in time and size.

        Raises:
            ArgumentInvalid: The template refuses the conversation, or fails on it.
        """
        rendered = self.render_within(messages, self._limit_s)
        if rendered is None:
            raise ArgumentInvalid("messages: the model's chat template took too long over them.")
        return rendered

    def render_within(self, messages: Sequence[Message], limit_s: float) -> str | None:
        """As `render`, but gives up after `limit_s` and returns None."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._render_bounded(turns, limit_s)
        except _Refused as error:
            raise ArgumentInvalid(f"messages: the model's chat template says: {error}") from None
        except _TooLong:
            return None
        except jinja2.TemplateError as error:
            raise ArgumentInvalid(
                f"messages: the model's chat template failed on them: {type(error).__name__}."
            ) from None
        except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise ArgumentInvalid(
                f"messages: the model's chat template failed on them: {type(error).__name__}."
            ) from None

    def _render_bounded(self, turns: list[dict[str, str]], limit_s: float) -> str:
        if self._is_plain and len(turns) <= PLAIN_MESSAGES_MAX:
            return self._render_watched(turns, None)
        return self._render_watched(turns, _deadline(time.thread_time() + limit_s))

    def _render_watched(self, turns: list[dict[str, str]], watch: Trace | None) -> str:
        pieces: list[str] = []
        chars = 0
        stream = self._template.generate(messages=turns, add_generation_prompt=True, **self._variables)
        previous = sys.gettrace(), sys.getprofile()
        if watch is not None:
            sys.setprofile(_kept_up(watch))
            sys.settrace(watch)
        try:
            for piece in stream:
                chars += len(piece)
                if chars > RENDERED_CHARS_MAX:
                    raise _TooLong
                pieces.append(piece)
        finally:
            if watch is not None:
                sys.setprofile(previous[1])
                sys.settrace(previous[0])
        return "".join(pieces)


def _deadline(end_s: float) -> Trace:
    """A trace function that ends whatever runs in this thread when the time is over.

    Nothing else stops a loop without output: a thread cannot be killed. The time is the processor's, so that
    a machine that is busy with others makes no template look slow.
    """
    lines = itertools.count(1)
    is_over = False

    def trace(frame: FrameType, _event: str, _argument: Any) -> Trace | None:
        nonlocal is_over
        is_over = is_over or (next(lines) % LINES_PER_LOOK == 0 and time.thread_time() > end_s)
        # Elsewhere it would be dropped, as nobody can be told of it: in a finalizer, or in a callback of the
        # garbage collector, which runs whenever it likes.
        if is_over and frame.f_code.co_filename.startswith(_TEMPLATE_CODE):
            raise _TooLong
        # Of what a template calls the calls are enough: one of them does no more than its argument has items.
        return trace if frame.f_code.co_filename == _TEMPLATE_FILE else None

    return trace


def _kept_up(watch: Trace) -> Trace:
    """A profile function that sets the trace function `watch` again when it was lost.

    The interpreter drops a trace function that raises, and drops the exception too where nobody can be told
    of it, as at the end of a generator that nobody reads any more. A template would then go on unwatched.
    """

    def profile(_frame: FrameType, _event: str, _argument: Any) -> None:
        if sys.gettrace() is None:
            sys.settrace(watch)

    return profile


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """`str.replace`, unless the result would be too large."""
    text, old, new = str(text), str(old), str(new)
    times = -1 if count is None else int(count)
    found = text.count(old) if times < 0 else min(times, text.count(old))
    if len(text) + found * len(new) > RENDERED_CHARS_MAX:
        raise jinja2.exceptions.SecurityError("the result of replace is too large")
    replaced: str = text.replace(old, new, times)
    return replaced


def _repeats_little(left: Any, right: Any) -> bool:
    sequence, times = (left, right) if isinstance(right, int) else (right, left)
    if not isinstance(times, int) or not hasattr(sequence, "__len__"):
        return False
    return len(sequence) * times <= REPEATED_CHARS_MAX


def _raise_exception(message: object) -> str:
    raise _Refused(str(message)[:200])


def _strftime_now(pattern: object) -> str:
    return datetime.now(tz=UTC).strftime(str(pattern)[:100])


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as models were trained on it: Jinja's own filter escapes for HTML."""
    if indent is not None and not 0 <= int(indent) <= INDENT_MAX:
        raise jinja2.exceptions.SecurityError("the indentation is too deep")
    return json.dumps(value, ensure_ascii=False, indent=indent)
