"""Token ids become text: whole characters, and nothing after a stop string."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.detokenizer import Detokenizer, StopMatcher, Transcript

TEXTS = st.text(alphabet="abc é日🎉\n", max_size=40)
STOPS = st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), max_size=4)


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer of bytes, the hardest case: every character is cut."""
    return bytes(token_ids).decode(errors="replace")


def pieces(items: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    """`items` in pieces of the given sizes, the rest in one."""
    found, at = [], 0
    for size in cuts:
        found.append(items[at : at + size])
        at += size
    return [*found, items[at:]]


@given(TEXTS, st.lists(st.integers(0, 7), max_size=10))
def test_any_grouping_of_tokens_gives_the_same_text(text: str, cuts: list[int]) -> None:
    """And what is emitted on the way never holds half a character."""
    transcript = Transcript(decode_bytes)
    emitted = [transcript.push(part).text for part in pieces(list(text.encode()), cuts)]
    assert "".join(emitted) + transcript.flush().text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in emitted)


@given(TEXTS, STOPS, st.lists(st.integers(0, 7), max_size=10))
def test_any_grouping_of_tokens_finds_the_same_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    """The text is cut before the stop string that is complete first, and no part of it gets out."""
    one_by_one, grouped = Transcript(decode_bytes, stops), Transcript(decode_bytes, stops)
    answers = []
    for transcript, sizes in ((one_by_one, [1] * 200), (grouped, cuts)):
        emitted, stop = "", None
        for part in pieces(list(text.encode()), sizes):
            piece = transcript.push(part)
            emitted, stop = emitted + piece.text, piece.stop
            if stop is not None:
                break
        answers.append((emitted if stop is not None else emitted + transcript.flush().text, stop))
    assert answers[0] == answers[1]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert answers[0][0] == (text[: min(ends)[1]] if ends else text)
    assert one_by_one.token_ids == grouped.token_ids


def test_many_stop_strings_cost_little() -> None:
    """As many and as long as there may be, and a text made for them."""
    stops = ["a" * 255 + "b", *("a" * size + "ba" for size in range(190, 253))]
    matcher = StopMatcher(stops)
    pieces = ["a" * 4] * 60 + (["a" * 4] * 40 + ["c" + "a" * 3]) * 20
    began_s = time.thread_time()
    said = [matcher.push(piece) for piece in pieces]
    # Of the order of 0.1 ms for a piece.
    assert time.thread_time() - began_s < len(pieces) * 0.001
    assert "".join(cut.text for cut in said) + matcher.flush() == "".join(pieces)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_has_them(raw: bytes) -> None:
    """Broken bytes decode as they do at once; at the end, where a character was cut off, nothing is added."""
    detokenizer = Detokenizer(decode_bytes)
    limited = raw[:30]
    text = "".join(map(detokenizer.push, limited)) + detokenizer.flush()
    assert text == decode_bytes(limited).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_character_that_is_cut_off_at_the_end_is_left_out() -> None:
    """The last token allowed was half of it: the text ends before it, and the token still counts."""
    transcript = Transcript(decode_bytes)
    assert transcript.push("a日".encode()[:3]).text + transcript.flush().text == "a"
    assert len(transcript.token_ids) == 3


def test_a_run_of_broken_bytes_is_not_held_for_ever() -> None:
    """A window that grew with each token would make long answers quadratic."""
    detokenizer = Detokenizer(decode_bytes)
    emitted = [detokenizer.push(0x80) for _ in range(200)]
    assert len("".join(emitted)) > 150


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    """Held text comes with what refutes it, or at the end."""
    matcher = StopMatcher(["###"])
    assert matcher.push("a#").text == "a"
    assert matcher.push("#").text == ""
    assert matcher.push("b").text == "##b"
    assert matcher.push("#").text == ""
    assert matcher.flush() == "#"


def test_a_stop_string_may_span_tokens() -> None:
    """The tokens that made it are counted, the text before it is delivered, the rest is dropped."""
    transcript = Transcript(decode_bytes, ["END"])
    piece = transcript.push(b"abcENDdef")
    assert (piece.text, piece.stop, bytes(piece.token_ids)) == ("abc", "END", b"abcEND")
