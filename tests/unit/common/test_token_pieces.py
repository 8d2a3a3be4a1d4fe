"""What single tokens stand for, in vocabularies of each kind: no byte of an answer is lost or changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.common.hf_tokenizer import HfTokenizer
from services.common.token_pieces import TokenPiece
from tests.fixtures.tiny_tokenizer import BEGIN, END, write_tokenizer

LLAMA = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1, right=0),
    ]
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    """A vocabulary of bytes."""
    return HfTokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def made(words: list[str], decoder: decoders.Decoder) -> HfTokenizer:
    """A tokenizer of some words, and of an end, which is the first id behind them."""
    vocabulary = {word: number for number, word in enumerate(["?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return HfTokenizer(tokenizer, None)


@given(st.text(alphabet="hel a\n é日🎉👩\u200d\x00\xad", max_size=30))
def test_the_bytes_of_all_tokens_are_the_text(byte_level: HfTokenizer, text: str) -> None:
    """Also where a character is several tokens."""
    ids = byte_level._encode_raw_now(text)
    assert b"".join(byte_level.piece(token_id).raw for token_id in ids).decode() == text
    assert all(TokenPiece.of_bytes(byte_level.piece(one).raw) == byte_level.piece(one) for one in ids)


def test_every_byte_has_a_piece_of_its_own(byte_level: HfTokenizer) -> None:
    """Decoded alone, half of them look the same; here no two tokens do, and special ones have their names."""
    pieces = [byte_level.piece(token_id) for token_id in range(byte_level.vocabulary)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(piece.raw for piece in pieces[: len(alphabet)]) == [
        bytes([number]) for number in range(256)
    ]
    assert len({piece.text for piece in pieces}) == len(pieces)
    assert byte_level.piece(BEGIN) == TokenPiece("<|begin|>", b"<|begin|>")
    assert byte_level.piece(END) == TokenPiece("<|end|>", b"<|end|>")
    assert byte_level.piece(END + 1) == TokenPiece("", b"")


def test_an_added_token_is_spelled_as_it_is(tmp_path: Path) -> None:
    """Also where its characters are none that stand for bytes."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("  日", special=False), AddedToken("<tool_call>", special=False)])
    held = HfTokenizer(tokenizer, None)
    assert [held.piece(END + at).text for at in (1, 2)] == ["  日", "<tool_call>"]
    assert held.decode((END + 1, END + 2)) == "  日<tool_call>"


@pytest.mark.parametrize(
    ("decoder", "words", "pieces"),
    [
        (LLAMA, ["▁Paris", "is", "▁", "<0xC3>", "<0xA9>", "é"], [" Paris", "is", " ", b"\xc3", b"\xa9", "é"]),
        (decoders.Metaspace(), ["▁Paris", "is", "▁", "<0xC3>"], [" Paris", "is", " ", "<0xC3>"]),
        (decoders.WordPiece(), ["Paris", "##is", "."], [" Paris", "is", "."]),
        (decoders.Fuse(), ["Paris", "aa"], ["Paris", "aa"]),
        (decoders.CTC(), ["a"], ["a"]),
    ],
    ids=["fallback to bytes", "metaspace", "pieces of words", "none to speak of", "without repetition"],
)
def test_a_token_stands_for_what_it_adds(
    decoder: decoders.Decoder, words: list[str], pieces: list[str | bytes]
) -> None:
    """The space before a word is a part of it, and a byte is that byte."""
    tokenizer = made(words, decoder)
    read = [tokenizer.piece(number) for number in range(1, len(words) + 1)]
    assert [piece.raw for piece in read] == [one.encode() if isinstance(one, str) else one for one in pieces]
    assert [piece.text for piece in read if b"\xc3" != piece.raw != b"\xa9"] == [
        one for one in pieces if isinstance(one, str)
    ]
    assert tokenizer.piece(len(words) + 1).text == "</s>"
