"""The trial of a grammar, run as a program of its own. Owns: how formats become grammars of the library.

A hostile format can keep the library busy for minutes, fill its memory or end its process, and nothing inside
a process can stop it. So each format is compiled here first: this process is killed when it takes too long,
may use little memory, and takes nothing with it when it dies. What passes here passes in the worker too.

One line of JSON in, `{"kind", "texts"}`; one line out, `{"grammar"}` or `{"flaw"}`. It ends with its input.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

# Address space of the trial. The library itself takes a tenth of it; the rest bounds what a format can fill.
MEMORY_BYTES_MAX = 1 << 30

# The worker kills a trial long before; this ends one whose worker was killed itself.
ALARM_S = 2

# A message longer than this is somebody's grammar rather than the flaw in it.
FLAW_CHARS_MAX = 300

# Between two tokens of JSON. The library's own default has no end, and a model can lose itself in it.
WHITESPACE = r"[ \n]{0,16}"

# What one step may cost the worker: some 14 ms of lexing and 3 ms of parsing; and 40 MB for a sequence.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


# Enough to come past the opening of an object or a list.
STEPS = 4
ALL_BYTES = (1 << 256) - 1


def read_grammar(kind: str, texts: list[str]) -> str:
    """The library's form of a format.

    Raises:
        ValueError: It is not well-formed.
    """
    match kind:
        case "json_schema":
            return _read_schema(texts[0])
        case "regex":
            return LLMatcher.grammar_from_regex(texts[0])
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts))
        case _:
            return grammar_from("ebnf", texts[0])


def _read_schema(text: str) -> str:
    schema = json.loads(text)
    if schema is False:
        raise ValueError("no value fits it")
    return LLMatcher.grammar_from_json_schema(
        {} if schema is True else text,
        overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True},
    )


def flaw_in(matcher: LLMatcher) -> str:
    """What is wrong with a compiled grammar, in words; empty: nothing."""
    if not matcher.is_error():
        return ""
    # Behind these marks the library would show its state.
    told = matcher.get_error().partition("<state>")[0].partition("<non-verbose/>")[0]
    lines = told.splitlines()
    return " ".join(line.strip() for line in lines if line.strip())[:FLAW_CHARS_MAX] or "not usable"


def _step(matcher: LLMatcher) -> None:
    """Takes a few tokens: a grammar with too many branches breaks where they begin, not before."""
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            return
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ALL_BYTES
        if not mask or matcher.is_error():
            return
        # The highest byte: brackets and letters rather than white space.
        matcher.consume_token(mask.bit_length() - 1)


def _try(tokenizer: LLTokenizer, line: str) -> dict[str, str]:
    asked = json.loads(line)
    try:
        grammar = read_grammar(asked["kind"], asked["texts"])
    except (ValueError, RecursionError) as error:
        return {"flaw": str(error)[:FLAW_CHARS_MAX]}
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    _step(matcher)
    flaw = flaw_in(matcher)
    return {"flaw": flaw} if flaw else {"grammar": grammar}


def main() -> None:
    """Answers each line of standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Bytes are vocabulary enough: what takes long does so before any token is looked at.
    tokenizer = LLTokenizer("byte")
    for line in sys.stdin:
        signal.alarm(ALARM_S)
        reply = _try(tokenizer, line)
        signal.alarm(0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
