"""The arithmetic of LLM.int8. Owns: how rows become bytes and outliers, and products of bytes numbers again.

LLM.int8 (Dettmers et al., 2022): of each row the columns beyond a threshold are multiplied in single
precision; the others share a scale, and are multiplied as integers, exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from services.worker.adapters.packed_product import BLOCK, WORD, ZERO_POINT
from services.worker.adapters.vector_code import F32, I8, I32, I64, LANES, Array, Lane, Value, Variable
from services.worker.adapters.vector_program import Sweep

# Beyond this magnitude a number is an outlier, by the paper.
OUTLIER_THRESHOLD = 6.0
INT8_MAX = 127

# Keeps the scale of a row of zeros finite.
TINY = 1e-20

# The sign's place; numbers without it have the order of their bits, and what is no number is the largest.
MAGNITUDE_BITS = 0x7FFF_FFFF
INFINITE_BITS = 0x7F80_0000
(THRESHOLD_BITS,) = struct.unpack("<i", struct.pack("<f", OUTLIER_THRESHOLD))

# Outliers come in the same few columns again and again; of each weight so many are kept side by side.
KEPT_COLUMNS = 64


def product(code: Sweep) -> Array:
    """The product that comes in, `[tokens, outputs]`, once `finish` has made it whole."""
    return code.pointed(code.argument("product"), F32)


def quantize(code: Sweep, widest: int, token: Value, inputs: int, read: Callable[[Lane], Value]) -> None:
    """Says a row in bytes, and apart from them what is beyond the threshold.

    A row with a number that is infinite, or none, is spoilt: all that is made of it is none either, and costs
    no more than a row with one outlier, so that its neighbours do not wait for it.
    """
    size, apart = Variable(code, code.filled(0, I32)), Variable(code, code.filled(0, I32))
    largest_of_all = Variable(code, code.filled(0, I32))

    def beyond(numbers: Value) -> tuple[Value, Value]:
        magnitudes = code.reread(numbers, I32) & MAGNITUDE_BITS
        return magnitudes, magnitudes > THRESHOLD_BITS

    def look(lane: Lane) -> None:
        magnitudes, outside = beyond(read(lane))
        largest_of_all.set(code.largest(magnitudes, largest_of_all.get()))
        size.set(code.largest(code.select(outside, 0, magnitudes), size.get()))
        apart.set(apart.get() + code.converted(outside, I32))

    code.each(inputs, look)
    largest = code.largest(code.reread(code.peak(size.get()), F32), TINY)
    code.array("steps", F32).put(token, largest * (1.0 / INT8_MAX))
    inverse = code.number(float(INT8_MAX)) / largest
    target = code.array("bytes", I8).at(token * inputs)

    def write(lane: Lane) -> None:
        numbers = read(lane)
        inner = code.select(beyond(numbers)[1], 0.0, numbers * inverse)
        lane.store(target, code.converted(code.converted(code.rounded(inner), I32), I8) ^ -ZERO_POINT)

    code.each(inputs, write)
    counts, found = code.array("counts", I32), code.total(apart.get())

    def spoil() -> None:
        counts.put(token, code.number(1, I32))
        code.array("columns", I32).put(token * widest, code.number(0, I32))
        code.array("outliers", F32).put(token * widest, code.number(math.nan))

    def list_them() -> None:
        # Each lane counts with minus one: that is what a true condition is as a number.
        counts.put(token, code.number(0, I32) - found)
        with code.when(found.differs(0)):
            _list_outliers(code, widest, token, inputs, read)

    code.either(code.peak(largest_of_all.get()) >= INFINITE_BITS, spoil, list_them)


def _list_outliers(
    code: Sweep, widest: int, token: Value, inputs: int, read: Callable[[Lane], Value]
) -> None:
    """Writes the outliers of a row and their columns, in the order of columns."""
    columns = code.array("columns", I32).at(token * widest)
    outliers = code.array("outliers", F32).at(token * widest)
    count = Variable(code, code.number(0, I64))
    spare = code.zeros(F32)

    def write(lane: Lane) -> None:
        spare.spill(0, read(lane))
        with code.loop(0, LANES) as place:
            number = spare.get(place)
            with code.when((code.reread(number, I32) & MAGNITUDE_BITS) > THRESHOLD_BITS):
                columns.put(count.get(), code.converted(lane.first + place, I32))
                outliers.put(count.get(), number)
                count.set(count.get() + 1)

    code.each(inputs, write)


def keep(code: Sweep, widest: int, outputs: int) -> None:
    """Lays the weight's columns that this call's outliers need side by side, before threads read them."""
    clock, uses = code.array("clock", I64), code.array("uses", I64)
    slots, owners = code.array("slots", I32), code.array("owners", I32)
    now = clock.get(1) + 1
    clock.put(1, now)
    with code.loop(0, code.argument("tokens")) as token:
        columns = code.array("columns", I32).at(token * widest)
        count = code.converted(code.array("counts", I32).get(token), I64)
        with code.loop(0, count) as index:
            column = columns.get(index)
            kept = slots.get(code.converted(column, I64))

            def use(kept: Value = kept) -> None:
                uses.put(code.converted(kept, I64), now)

            def find(column: Value = column) -> None:
                place = (clock.get(0) + 1) % KEPT_COLUMNS
                clock.put(0, place)
                with code.when(uses.get(place) < now):
                    uses.put(place, now)
                    _replace(code, outputs, (slots, owners), place, column)

            code.either(kept >= 0, use, find)


def _replace(code: Sweep, outputs: int, places: tuple[Array, Array], place: Value, column: Value) -> None:
    """Gives a place to another column."""
    slots, owners = places
    former = owners.get(place)
    with code.when(former >= 0):
        slots.put(code.converted(former, I64), code.number(-1, I32))
    owners.put(place, column)
    slots.put(code.converted(column, I64), code.converted(place, I32))
    kept, byte = code.array("kept", I8).at(place * outputs), _Column(code, code.converted(column, I64))
    with code.loop(0, outputs) as output:
        kept.put(output, byte.get(output))


class _Column:
    """The bytes of one column of the weight, which is packed."""

    def __init__(self, code: Sweep, column: Value) -> None:
        # Read once: what a loop writes could be these, as far as the compiler knows.
        self._block_bytes = code.field("inputs") * BLOCK
        self._bytes = code.array("weight", I8).at(column // WORD * (BLOCK * WORD) + column % WORD)

    def get(self, output: Value) -> Value:
        """The one of an output."""
        return self._bytes.get(output // BLOCK * self._block_bytes + output % BLOCK * WORD)


def finish(code: Sweep, widest: int, token: Value, outputs: int) -> Array:
    """Makes a row of sums whole, where they lie: scales, outliers, bias. Returns it."""
    row, scales = product(code).at(token * outputs), code.array("scales", F32)
    step, sums = code.array("steps", F32).get(token), code.pointed(code.argument("product"), I32)

    def scale(lane: Lane) -> None:
        whole = code.converted(lane.load(sums.at(token * outputs), I32), F32)
        lane.store(row, whole * lane.load(scales, F32) * step)

    code.each(outputs, scale)
    columns = code.array("columns", I32).at(token * widest)
    outliers = code.array("outliers", F32).at(token * widest)
    count = code.converted(code.array("counts", I32).get(token), I64)
    with code.loop(0, count) as index:
        column, outlier = code.converted(columns.get(index), I64), outliers.get(index)
        kept = code.converted(code.array("slots", I32).get(column), I64)

        def beside(kept: Value = kept, outlier: Value = outlier) -> None:
            weight = code.array("kept", I8).at(kept * outputs)

            def add(lane: Lane) -> None:
                number = code.converted(lane.load(weight, I8), F32) * lane.load(scales, F32)
                lane.store(row, code.fused(outlier, number, lane.load(row, F32)))

            code.each(outputs, add)

        def scattered(column: Value = column, outlier: Value = outlier) -> None:
            byte = _Column(code, column)
            with code.loop(0, outputs) as output:
                number = code.converted(byte.get(output), F32) * scales.get(output)
                row.put(output, code.fused(outlier, number, row.get(output)))

        code.either(kept >= 0, beside, scattered)
    with code.when(code.field("bias").differs(0)):
        bias = code.array("bias", F32)
        code.each(outputs, lambda lane: lane.store(row, lane.load(row, F32) + lane.load(bias, F32)))
    return row
