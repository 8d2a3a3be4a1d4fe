"""Where tokens begin in an answer's text. Owns: that count, the same whole and streamed.

Must not know: what of the text went out already. That may wait for the rest of a stop string, and a token's
place does not change with it.
"""

from __future__ import annotations

from services.gateway.core.detokenizer import Detokenizer
from services.gateway.core.params import Decode


class TextOffsets:
    """The places of one answer's tokens, in characters from its beginning.

    Tokens that share a character begin where it does.
    """

    def __init__(self, decode: Decode) -> None:
        self._detokenizer = Detokenizer(decode)
        self._at = 0

    def next(self, token_id: int) -> int:
        """Takes the next token; returns where it begins."""
        begins = self._at
        self._at += len(self._detokenizer.push(token_id))
        return begins
