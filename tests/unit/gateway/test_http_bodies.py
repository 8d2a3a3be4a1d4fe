"""Bodies by HTTP: where they are read, and what is said of scores."""

from __future__ import annotations

import math
import threading
import time

import pytest
from google.api.httpbody_pb2 import HttpBody

from services.common.errors import ArgumentInvalid
from services.gateway.core.events import Chunk, TokenLogprob
from services.gateway.http import openai, openai_fields
from services.gateway.http.bodies import LOOP_BYTES_MAX, dump, read_body


async def test_a_large_body_is_read_beside_the_loop() -> None:
    """It would stop every stream for as long; a small one costs no thread. Errors arrive either way."""

    def read(data: bytes, content_type: str) -> tuple[int, str, threading.Thread]:
        return len(data), content_type, threading.current_thread()

    for size, beside in ((LOOP_BYTES_MAX, False), (LOOP_BYTES_MAX + 1, True)):
        body = HttpBody(content_type="text/plain", data=b" " * size)
        length, kind, thread = await read_body(body, read)
        assert (length, kind, thread is not threading.main_thread()) == (size, "text/plain", beside)
        with pytest.raises(ArgumentInvalid):
            await read_body(body, openai_fields.read_chat)


def test_what_json_cannot_spell_is_not_written() -> None:
    """A body with it would be none that a client can read."""
    for number in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="JSON"):
            dump({"metadata": {"a": number}})


def test_the_offsets_of_many_tokens_take_linear_time() -> None:
    """Each token begins where the ones before it end; a sum over all of them for each would take a minute."""
    ids = tuple(range(97, 123)) * 2_000
    chunks = [Chunk(0, "", ids, (TokenLogprob(-1.0),) * len(ids))]
    began_s = time.monotonic()
    scores = openai.completion_logprobs(chunks, lambda given: "".join(map(chr, given)) * 2, 7)
    assert time.monotonic() - began_s < 10
    assert scores["text_offset"] == list(range(7, 7 + 2 * len(ids), 2))
    assert openai.completion_logprobs([], str, 7)["text_offset"] == []
