"""`interlock chat`. Owns: a conversation in the terminal, token by token."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import sys
import unicodedata

from interlock import resume
from interlock.v1.gateway_service_pb2 import GenerateRequest
from interlock.v1.generation_pb2 import FINISH_REASON_LENGTH, ChatInput, ChatMessage

from services.cli.access import entrance, find_door
from services.cli.failure import CommandFailed
from services.cli.values import NOT_UNICODE, is_unicode
from services.common.errors import ContextExceeded

# The contract's default deadline: a queue of strangers may be ahead.
_ANSWER_TIMEOUT_S = 240.0
# What is remembered of a conversation, the oldest goes first: questions with their answers, for a template
# may refuse a conversation that does not begin with a question.
_PAIRS_MAX = 31


def run(arguments: argparse.Namespace) -> int:
    """Answers one prompt, or talks until the input ends."""
    if arguments.prompt is not None:
        asyncio.run(_answer([ChatMessage(role="user", content=arguments.prompt)], arguments))
        return 0
    # Whether there is a mesh is told before the first question.
    find_door()
    if sys.stdin.isatty():
        # Its mere import gives `input` a line editor and a history.
        importlib.import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are told of the line that has them; else they would end the conversation.
        sys.stdin.reconfigure(errors="surrogateescape")
    print("Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    return _converse(arguments)


def _converse(arguments: argparse.Namespace) -> int:
    turns: list[ChatMessage] = []
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not prompt:
            continue
        if not is_unicode(prompt):
            print(f"interlock: {NOT_UNICODE}", file=sys.stderr)
            continue
        try:
            turns = _continued(turns[-2 * _PAIRS_MAX :], prompt, arguments)
        except KeyboardInterrupt:
            print(" [stopped]")
            continue
        except CommandFailed as error:
            print(f"interlock: {error}", file=sys.stderr)


def _continued(turns: list[ChatMessage], prompt: str, arguments: argparse.Namespace) -> list[ChatMessage]:
    """The conversation with one more question and its answer, without the oldest where the context is full.

    Raises:
        CommandFailed: The question was not answered, or alone has no room.
    """
    while True:
        asked = [*turns, ChatMessage(role="user", content=prompt)]
        try:
            answer = asyncio.run(_answer(asked, arguments))
        except CommandFailed as error:
            if error.reason != ContextExceeded.reason or not turns:
                raise
            turns = turns[2:]
        else:
            return [*asked, ChatMessage(role="assistant", content=answer)]


async def _answer(turns: list[ChatMessage], arguments: argparse.Namespace) -> str:
    """Prints the answer as it comes and returns it."""
    door = find_door()
    request = GenerateRequest(chat=ChatInput(messages=turns), max_tokens=arguments.max_tokens)
    if arguments.model:
        request.model = arguments.model
    spoken: list[str] = []
    try:
        async with entrance(door) as (channel, metadata):
            events = resume.generate_async(channel, request, metadata=metadata, timeout_s=_ANSWER_TIMEOUT_S)
            async for event in events:
                if event.HasField("chunk"):
                    spoken.append(event.chunk.text)
                    print(_printable(event.chunk.text), end="", flush=True)
                elif event.HasField("finished"):
                    print(" [...]" if event.finished.reason == FINISH_REASON_LENGTH else "")
    except CommandFailed:
        if spoken:
            # The error begins a line of its own.
            print(flush=True)
        raise
    return "".join(spoken)


def _printable(text: str) -> str:
    """The text without control characters: a model's words must not steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
