"""Bodies by HTTP: where they are read, and what is said of scores."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import pytest
from google.api.httpbody_pb2 import HttpBody
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import ArgumentInvalid
from services.common.token_pieces import TokenPiece
from services.gateway.core.detokenizer import Transcript
from services.gateway.core.events import Chunk, Finished, FinishReason, Started, TokenLogprob, Usage
from services.gateway.http import native, openai, openai_fields
from services.gateway.http.bodies import (
    LOOP_BYTES_MAX,
    SLICE_SCORES,
    Sliced,
    dump,
    pieces,
    read_body,
    written,
)
from services.gateway.http.offsets import TextOffsets
from services.gateway.http.whole import Answer, Said


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


def decode(token_ids: Sequence[int]) -> str:
    """A tokenizer of bytes: a character beyond ASCII is several tokens."""
    return bytes(token_ids).decode(errors="replace")


def piece_of(token_id: int) -> TokenPiece:
    """What one of its tokens stands for."""
    return TokenPiece.of_bytes(bytes([token_id]))


class BytesAsWords:
    """The same tokenizer, as a transcript needs it."""

    decode = staticmethod(decode)
    piece = staticmethod(piece_of)


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
    scores = openai.completion_logprobs(chunks, piece_of, TextOffsets(decode).next)
    assert list(scores["text_offset"]) == list(range(len(ids)))
    assert time.monotonic() - began_s < 10
    assert list(openai.completion_logprobs([], piece_of, TextOffsets(decode).next)["text_offset"]) == []


@given(
    st.text(alphabet="abxé日🎉\n", max_size=30),
    st.lists(st.text(alphabet="abx", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 7), max_size=30),
)
def test_a_token_begins_where_its_character_does(text: str, stops: list[str], sizes: list[int]) -> None:
    """However tokens are grouped, and whatever of the text is held back for a stop string."""
    transcript, offsets = Transcript(BytesAsWords(), stops), TextOffsets(decode)
    ids, told, taken, stop = text.encode(), [], 0, None
    for size in [*sizes, len(ids)]:
        if stop is not None:
            break
        piece = transcript.push(ids[taken : taken + size])
        chunk = Chunk(taken, piece.text, piece.token_ids, (TokenLogprob(-1.0),) * len(piece.token_ids))
        told += list(openai.completion_logprobs([chunk], piece_of, offsets.next)["text_offset"])
        taken, stop = taken + len(piece.token_ids), piece.stop
    begins = [at for at, character in enumerate(text) for _ in character.encode()]
    assert told == begins[: len(told)]
    assert len(told) == len(transcript.token_ids)


def test_half_of_a_character_is_told_by_its_bytes() -> None:
    """Those of all tokens are the text's; of alternatives that look the same the likelier one is told."""
    said = "🎉 é"
    score = TokenLogprob(-0.5, ((0xF0, -0.5), (0x9F, -1.0)))
    chunks = [Chunk(0, said, tuple(said.encode()), (score,) * len(said.encode()))]
    told = list(openai.chat_logprobs(chunks, piece_of)["content"])
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == said
    assert [entry["token"] for entry in told[:2]] == ["\\xf0", "\\x9f"]
    assert [[other["bytes"] for other in entry["top_logprobs"]] for entry in told[:1]] == [[[0xF0], [0x9F]]]
    scores = openai.completion_logprobs(chunks, piece_of, int)
    assert next(iter(scores["top_logprobs"])) == {"\\xf0": -0.5, "\\x9f": -1.0}
    alike = openai.completion_logprobs(chunks, lambda _: TokenPiece("x", b"x"), int)
    assert next(iter(alike["top_logprobs"])) == {"x": -0.5}


@given(st.integers(0, 12), st.integers(1, 5), st.text(max_size=5))
def test_slices_are_the_same_json(items: int, at_once: int, text: str) -> None:
    """However long they are, and whatever stands around them; what is no JSON is refused as ever."""
    array = Sliced(range(items), lambda item: {text: item}, at_once)
    told = [{text: item} for item in range(items)]
    sliced = pieces({"before": text, "a": [array, {"b": array}], "after": [text]})
    assert b"".join(sliced) == dump({"before": text, "a": [told, {"b": told}], "after": [text]})
    for wrong in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            list(pieces({"a": Sliced([wrong], lambda item: item, 1)}))


SCORED = 300
SCORE = TokenLogprob(-0.123456789, tuple((65 + at, -1.23456789 * at) for at in range(20)))
MANY = Chunk(0, "a" * SCORED, (65,) * SCORED, (SCORE,) * SCORED)
HEAD = openai.Head("id", 1, "m", "r1")
STARTED = Started("id", "m", "r1", "w1", 1, 0.0)
END = Finished(FinishReason.STOP)


def chat(answer: Answer) -> Iterable[bytes]:
    """A whole conversation's completion."""
    scores = openai.chat_logprobs(answer.sequences[0].chunks, piece_of)
    return openai.chat_body(HEAD, [openai.chat_choice(answer.text, [], END, scores)], Usage())


def completion(answer: Answer) -> Iterable[bytes]:
    """A whole text's completion."""
    scores = openai.completion_logprobs(answer.sequences[0].chunks, piece_of, TextOffsets(decode).next)
    return openai.completion_body(HEAD, [openai.completion_choice(answer.text, END, scores)], Usage())


STREAMED: dict[str, Callable[[], Iterable[bytes]]] = {
    "chat": lambda: openai.chat_text(HEAD, 0, "a", openai.chat_logprobs([MANY], piece_of), usage=False),
    "calls": lambda: openai.chat_calls(HEAD, 0, [], openai.chat_logprobs([MANY], piece_of), usage=False),
    "completion": lambda: openai.completion_text(
        HEAD, 0, "a", openai.completion_logprobs([MANY], piece_of, TextOffsets(decode).next), usage=False
    ),
    "native": lambda: native.event_body(7, MANY),
}


@pytest.mark.parametrize("write", [chat, completion, native.result_body])
async def test_many_scores_are_written_in_slices_beside_the_loop(
    write: Callable[[Answer], Iterable[bytes]],
) -> None:
    """No call of the encoder has more of them than take it some milliseconds."""
    threads: set[threading.Thread] = set()
    sizes: list[int] = []

    def noted(answer: Answer) -> Iterable[bytes]:
        for piece in write(answer):
            threads.add(threading.current_thread())
            sizes.append(piece.count(b":-") + piece.count(b",-"))
            yield piece

    body = await written(Answer(STARTED, (Said((MANY,), END),)), noted)
    assert max(sizes) <= SLICE_SCORES
    assert sum(sizes) >= 20 * SCORED
    assert threads
    assert threading.main_thread() not in threads
    scores = json.loads(body)
    for key in ("choices", 0, "logprobs") if "choices" in scores else ("logprobs",):
        scores = scores[key]
    scores = scores if isinstance(scores, list) else scores.get("content", scores.get("tokens"))
    assert len(scores) == SCORED


@pytest.mark.parametrize("name", STREAMED)
def test_many_scores_of_a_stream_are_one_event_in_pieces(name: str) -> None:
    """Each is made when it is asked for, so that others have the loop in between."""
    told = list(STREAMED[name]())
    assert max(piece.count(b":-") for piece in told) <= SLICE_SCORES
    event = b"".join(told)
    assert event.endswith(b"}\n\n")
    assert event.count(b"data: ") == event.count(b"\n\n") == 1
    assert event.count(b"-0.123456789") == SCORED
    json.loads(event.partition(b"data: ")[2])
