"""Bodies that are read and written. Owns: what is too much for the loop, how JSON is written. No API.

Scores are the one thing of which an answer has tens of thousands. One call of the encoder for all of them
would keep every other thread from running for as long, the loop's included; so they are written in slices.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from google.api.httpbody_pb2 import HttpBody

from services.common.threads import in_thread
from services.gateway.core.events import TokenLogprob
from services.gateway.http.whole import Answer

# What is read on the loop. It takes some milliseconds at worst; a body at Envoy's limit would take a tenth of
# a second, in which no stream gets its tokens.
LOOP_BYTES_MAX = 1 << 16
# Scores and alternatives that are made and written at once: about two milliseconds.
SLICE_SCORES = 500
# A thread that writes lets the others go on for as long between two slices.
PAUSE_S = 0.0005

S = TypeVar("S")
T = TypeVar("T")

# Stands in a body where a sliced array goes. Nobody can say it, for nobody knows it.
_MARK = secrets.token_hex(16)


def _encoder(place: Callable[[Any], str] | None = None) -> json.JSONEncoder:
    """Of JSON that is as short as it can be; what JSON cannot spell must not be written as if."""
    return json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=place)


# Made once: every token of every stream is written by it.
_ENCODER = _encoder()


class Sliced(Generic[S]):
    """An array of a body that is made and written slice by slice.

    Args:
        items: What it is made of.
        write: What stands in the array for an item; is asked of one after the other, when it is written.
        at_once: Items of a slice.
    """

    def __init__(self, items: Sequence[S], write: Callable[[S], Any], at_once: int) -> None:
        self._items = items
        self._write = write
        self._at_once = at_once

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        """What stands in the array."""
        return map(self._write, self._items)

    def pieces(self) -> Iterator[bytes]:
        """The array as JSON, a piece for each slice."""
        before = b"["
        for at in range(0, len(self._items), self._at_once):
            made = [self._write(item) for item in self._items[at : at + self._at_once]]
            yield before + dump(made)[1:-1]
            before = b","
        yield b"]" if self._items else b"[]"


def at_once(scores: Sequence[tuple[int, TokenLogprob]]) -> int:
    """How many of these scores are written at once, by their alternatives."""
    return max(1, SLICE_SCORES // (1 + len(scores[0][1].alternatives))) if scores else 1


def dump(fields: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """JSON as short as it can be said. Raises ValueError for NaN and infinity, which it cannot say."""
    return _ENCODER.encode(fields).encode()


def pieces(fields: Mapping[str, Any]) -> Iterator[bytes]:
    """The same of a body with sliced arrays, piece by piece; each is made when it is asked for."""
    sliced: list[Sliced[Any]] = []

    def place(value: Any) -> str:
        if not isinstance(value, Sliced):
            raise TypeError(f"{type(value).__name__} is nothing that JSON can say.")
        sliced.append(value)
        return _MARK

    first, *others = _encoder(place).encode(fields).split(f'"{_MARK}"')
    yield first.encode()
    for array, between in zip(sliced, others, strict=True):
        yield from array.pieces()
        yield between.encode()


async def read_body(body: HttpBody, read: Callable[[bytes, str], T]) -> T:
    """What `read` makes of a body and its content type; of a large one in a thread. Raises what it raises."""
    data = body.data
    if len(data) > LOOP_BYTES_MAX:
        return await in_thread(read, data, body.content_type)
    return read(data, body.content_type)


async def written(answer: Answer, write: Callable[[Answer], Iterable[bytes]]) -> bytes:
    """The body that `write` makes of an answer; in a thread where it has scores, which take a second."""
    if any(chunk.logprobs for said in answer.sequences for chunk in said.chunks):
        return await in_thread(_joined_at_leisure, write, answer)
    return b"".join(write(answer))


def _joined_at_leisure(write: Callable[[Answer], Iterable[bytes]], answer: Answer) -> bytes:
    made: list[bytes] = []
    for piece in write(answer):
        made.append(piece)
        time.sleep(PAUSE_S)
    return b"".join(made)
