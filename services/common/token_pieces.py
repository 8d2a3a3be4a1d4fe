"""What single tokens stand for. Owns: the bytes of a token, of which its text alone tells too little.

A decoder makes one text of many tokens. Of one alone it loses what the others would have made whole: half of
a character becomes a replacement character, the space before a word is stripped as if a text began there, and
a special token is nothing. Pure; the tokenizer arrives as functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# How a vocabulary with bytes to fall back on spells one of them.
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenPiece:
    r"""What one token stands for.

    Attributes:
        text: Its text; of a byte that is no character by itself the number, as `\xe2`.
        raw: Its bytes; those of all tokens of a text are the text's, in UTF-8.
    """

    text: str
    raw: bytes

    @classmethod
    def of_bytes(cls, raw: bytes) -> TokenPiece:
        """The piece of some bytes."""
        return cls(raw.decode(errors="backslashreplace"), raw)


class TokenPieces:
    """The pieces of one tokenizer.

    Args:
        specials: The special tokens' names, by their ids.
        decoders: The kinds of decoder that make its tokens text, as `tokenizer.json` names them.
        name_of: A token as the vocabulary spells it; None where there is none.
        decode: Token ids to text; special tokens become nothing.
    """

    def __init__(
        self,
        specials: Mapping[int, str],
        decoders: frozenset[str],
        name_of: Callable[[int], str | None],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._specials = specials
        self._decoders = decoders
        self._name_of = name_of
        self._decode = decode

    def read(self, token_id: int) -> TokenPiece:
        """What a token stands for: a special one for its name, an id of no token for nothing."""
        name = self._specials.get(token_id)
        if name is not None:
            return TokenPiece(name, name.encode())
        name = self._name_of(token_id)
        if name is None:
            return TokenPiece("", b"")
        if "ByteLevel" in self._decoders:
            return TokenPiece.of_bytes(_of_byte_level(name))
        if "ByteFallback" in self._decoders and (fallback := _FALLBACK.fullmatch(name)):
            return TokenPiece.of_bytes(bytes.fromhex(fallback[1]))
        return self._read_beside_itself(token_id)

    def _read_beside_itself(self, token_id: int) -> TokenPiece:
        """What the token adds to a text that it does not begin."""
        once, twice = self._decode((token_id,)), self._decode((token_id, token_id))
        added = twice.removeprefix(once) if len(twice) > len(once) else once
        return TokenPiece.of_bytes(added.encode())


def _byte_alphabet() -> dict[str, int]:
    """Bytes by the characters that stand for them in vocabularies of bytes, as GPT-2's began it.

    Those that can be seen stand for themselves, the others for what follows the last of a byte's numbers.
    """
    seen = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    unseen = (number for number in range(0x100) if number not in seen)
    return {chr(number): number for number in seen} | {
        chr(0x100 + at): number for at, number in enumerate(unseen)
    }


_BYTES = _byte_alphabet()


def _of_byte_level(name: str) -> bytes:
    # A token that was added later may be spelled as it is.
    return bytes(map(_BYTES.__getitem__, name)) if _BYTES.keys() >= set(name) else name.encode()
