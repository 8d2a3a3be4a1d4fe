"""Token ids become text: whole characters, and nothing after a stop string."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from services.common import token_pieces
from services.common.hf_tokenizer import HfTokenizer
from services.common.token_pieces import TokenPiece
from services.gateway.core.detokenizer import Detokenizer, StopMatcher, Transcript

TEXTS = st.text(alphabet="abc é日🎉\n\N{REPLACEMENT CHARACTER}", max_size=40)
STOPS = st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), max_size=4)


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer of bytes, the hardest case: every character is cut."""
    return bytes(token_ids).decode(errors="replace")


class Bytes:
    """The tokenizer of bytes, as a transcript needs it."""

    decode = staticmethod(decode_bytes)

    def piece(self, token_id: int) -> TokenPiece:
        """See `Words.piece`."""
        return TokenPiece.of_bytes(bytes((token_id,)))


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
    transcript = Transcript(Bytes())
    emitted = [transcript.push(part).text for part in pieces(list(text.encode()), cuts)]
    assert "".join(emitted) + transcript.flush().text == text
    said = "".join(emitted)
    assert said == text[: len(said)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 7), max_size=10))
def test_any_grouping_of_tokens_finds_the_same_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    """The text is cut before the stop string that is complete first, and no part of it gets out."""
    one_by_one, grouped = Transcript(Bytes(), stops), Transcript(Bytes(), stops)
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
    text = "".join(map(detokenizer.push, limited)) + detokenizer.flush(Bytes().piece)
    # Without its last bytes, where they began a character.
    assert text == codecs.getincrementaldecoder("utf-8")("replace").decode(limited)


def test_a_character_that_is_cut_off_at_the_end_is_left_out() -> None:
    """The last token allowed was half of it: the text ends before it, and the token still counts."""
    transcript = Transcript(Bytes())
    assert transcript.push("a日".encode()[:3]).text + transcript.flush().text == "a"
    assert len(transcript.token_ids) == 3


def of_bytes(kind: str) -> HfTokenizer:
    """A tokenizer of the library with a token for each byte, whose id is its number."""
    if kind == "byte level":
        spelled = {number: name for name, number in token_pieces._BYTES.items()}
        names = [spelled[byte] for byte in range(256)]
        decoder: decoders.Decoder = decoders.ByteLevel()
    else:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return HfTokenizer(tokenizer, None)


@pytest.mark.parametrize("kind", ["byte level", "bytes to fall back on"])
def test_an_answer_may_end_with_the_replacement_character(kind: str) -> None:
    """It is what a model said, and not what half of one leaves; a special token behind it adds nothing."""
    words = of_bytes(kind)
    raw = "a\N{REPLACEMENT CHARACTER}日\N{REPLACEMENT CHARACTER}🎉\N{REPLACEMENT CHARACTER}".encode()
    for end in range(len(raw) + 1):
        for special in ([], [256]):
            transcript = Transcript(words)
            text = transcript.push([*raw[:end], *special]).text + transcript.flush().text
            assert text == raw[:end].decode(errors="ignore"), (end, special)


def test_a_token_that_ends_in_half_of_a_character_keeps_its_other_half() -> None:
    """The text before the half, which nothing completes, is told."""

    class Pairs(Bytes):
        """Each token is two bytes."""

        def decode(self, token_ids: Sequence[int]) -> str:
            """See `Words.decode`."""
            return b"".join(self.piece(token_id).raw for token_id in token_ids).decode(errors="replace")

        def piece(self, token_id: int) -> TokenPiece:
            """See `Words.piece`."""
            return TokenPiece.of_bytes(token_id.to_bytes(2, "big"))

    transcript = Transcript(Pairs())
    said = transcript.push(int.from_bytes(pair, "big") for pair in (b"ab", b"c\xf0", b"\x9f\x8e")).text
    assert said + transcript.flush().text == "abc"


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
    transcript = Transcript(Bytes(), ["END"])
    piece = transcript.push(b"abcENDdef")
    assert (piece.text, piece.stop, bytes(piece.token_ids)) == ("abc", "END", b"abcEND")
