"""Token ids to text, as they come. Owns: what of the text is certain already.

Must not know: tokenizers, clocks or clients. Two things are held back: the bytes of a character that is not
complete, and text that could be the beginning of a stop string. Tokens are taken one at a time, so the text
does not depend on how they were grouped on their way.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.gateway.core.events import TokenLogprob
from services.gateway.core.params import Decode, PieceOf, Words

# What a decoder makes of bytes that are no character (yet).
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A character has at most 4 bytes and a token at least one. A longer run of undecodable tokens is not a
# character in the making, and holding it would make each further token cost more.
UNDECODED_TOKENS_MAX = 32


class Detokenizer:
    """Decodes a sliding window, so that the cost of a token does not grow with the text before it."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._known_tokens = 0
        self._known_text = ""

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that became certain with it."""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._known_tokens
        if text.endswith(REPLACEMENT) and held <= UNDECODED_TOKENS_MAX:
            return ""
        return self._release(text)

    def flush(self, piece_of: PieceOf) -> str:
        """Returns what was held back, less the beginning of a character that nothing completes any more.

        The tokens' bytes tell that from what decodes so by itself: an answer may end with the very character.
        """
        text = self._decode(self._window)
        return self._release(self._completed(piece_of) if text.endswith(REPLACEMENT) else text)

    def _completed(self, piece_of: PieceOf) -> str:
        """The text of the window up to the last character that is complete."""
        raw = [piece_of(token_id).raw if self._decode((token_id,)) else b"" for token_id in self._window]
        loose = _loose_bytes(b"".join(raw))
        end = len(raw)
        # A decoder may spell a whole run of bytes otherwise because of the loose ones: they are left out.
        while loose and end > self._known_tokens and len(raw[end - 1]) <= loose:
            end -= 1
            loose -= len(raw[end])
        text = self._decode(self._window[:end])
        return text.removesuffix(REPLACEMENT) if loose else text

    def _release(self, text: str) -> str:
        certain = text[len(self._known_text) :]
        # The last released tokens stay as context: decoders treat the first token of a text differently.
        self._window = self._window[self._known_tokens :]
        self._known_tokens = len(self._window)
        self._known_text = self._decode(self._window)
        return certain


def _loose_bytes(raw: bytes) -> int:
    """How many bytes at the end begin a character that more of them could complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return len(decoder.getstate()[0])


@dataclass(frozen=True, slots=True)
class Cut:
    """What a piece of text leaves.

    Attributes:
        text: What is certainly not part of a stop string.
        stop: The stop string that was completed; None: none.
    """

    text: str
    stop: str | None = None


class StopMatcher:
    """Cuts a text before the first stop string that is completed in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops)
        self._held = ""

    def push(self, text: str) -> Cut:
        """Takes a piece of text, holding back what could be the beginning of a stop string."""
        if not self._stops:
            return Cut(text)
        before, text = len(self._held), self._held + text
        # What was held has none in it: a stop string that is new ends behind it.
        found = [
            (at + len(stop), at, stop)
            for stop in self._stops
            if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            # The first to be complete, not the first to begin: so it is found at the same token however
            # the text was cut into pieces.
            _, at, stop = min(found)
            self._held = ""
            return Cut(text[:at], stop)
        certain = len(text) - self._prefix_length(text)
        self._held = text[certain:]
        return Cut(text[:certain])

    def flush(self) -> str:
        """Returns what was held back: the beginning of a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            # In their order, those that begin with it are the first that are not before it.
            at = bisect_left(self._stops, end)
            if at < len(self._stops) and self._stops[at].startswith(end):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens added.

    Attributes:
        text: The text that became certain.
        token_ids: The tokens that count; those after a stop string do not.
        stop: The stop string that ended the text; None: none.
        logprobs: One for each token where they were asked for, else none.
    """

    text: str
    token_ids: tuple[int, ...]
    stop: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Transcript:
    """One sequence: its tokens, and the text that they make.

    Args:
        words: The tokenizer's way back to text.
        stops: Strings before which the text ends.
    """

    def __init__(self, words: Words, stops: Sequence[str] = ()) -> None:
        self._piece_of = words.piece
        self._detokenizer = Detokenizer(words.decode)
        self._matcher = StopMatcher(stops)
        self.token_ids: list[int] = []

    def push(self, token_ids: Iterable[int]) -> Piece:
        """Takes tokens in their order. After a stop string the rest is dropped."""
        texts: list[str] = []
        taken: list[int] = []
        stop = None
        for token_id in token_ids:
            taken.append(token_id)
            cut = self._matcher.push(self._detokenizer.push(token_id))
            texts.append(cut.text)
            stop = cut.stop
            if stop is not None:
                break
        self.token_ids.extend(taken)
        return Piece("".join(texts), tuple(taken), stop)

    def flush(self) -> Piece:
        """Ends the text: what was held back is certain now, and may complete a stop string."""
        cut = self._matcher.push(self._detokenizer.flush(self._piece_of))
        held = "" if cut.stop is not None else self._matcher.flush()
        return Piece(cut.text + held, (), cut.stop)
