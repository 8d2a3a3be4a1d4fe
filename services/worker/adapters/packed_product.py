"""Products with packed weights. Owns: the order in which the processor multiplies bytes, and how it does.

One instruction adds, for sixteen outputs, the products of four neighbouring bytes of a row with four bytes of
each output. So a packed weight has the bytes of four inputs side by side, of two times sixteen outputs. It is
read from memory once, for any number of rows. Where the processor lacks the instruction, others do the same,
exactly: libraries let the sums of two products overflow there.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from services.worker.adapters.vector_code import I8, I32, I64, LANES, Array, Lane, Value, Variable
from services.worker.adapters.vector_program import Compiled, Program, Sweep

# Inputs that an instruction takes of each output.
WORD = 4

# Vectors of outputs, and rows, whose sums are held in registers at a time.
VECTORS = 2
ROWS = 8

# Outputs that a thread takes at a time.
BLOCK = VECTORS * LANES

# Unsigned bytes are multiplied with signed ones, and zero is in the middle. Turning the highest bit of a
# signed byte adds as much.
ZERO_POINT = 128

# The largest sum of so many products of signed bytes fits a word.
INPUTS_MAX = (2**31 - 1) // 127**2


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a weight in the processor's order.

    Args:
        weight: int8, `[outputs, inputs]`, the inputs a multiple of WORD.

    Returns:
        int8, `[blocks, inputs / WORD, BLOCK, WORD]`: outputs that lack in the last block are zeros.

    Raises:
        ValueError: The inputs are no multiple of WORD.
    """
    outputs, inputs = weight.shape
    if inputs % WORD:
        raise ValueError(f"{inputs} inputs are no multiple of {WORD}")
    blocks = -(-outputs // BLOCK)
    whole = weight.new_zeros((blocks * BLOCK, inputs))
    whole[:outputs] = weight
    return whole.view(blocks, BLOCK, inputs // WORD, WORD).transpose(1, 2).contiguous()


class PackedProduct:
    """A product with a packed weight.

    Args:
        weight: As `packed` makes it.
        outputs: How many outputs it has.
    """

    def __init__(self, weight: torch.Tensor, outputs: int) -> None:
        inputs = weight.shape[1] * WORD
        corrections = weight.sum((1, 3), dtype=torch.int32).flatten().mul_(-ZERO_POINT)
        fields = (weight.data_ptr(), corrections.data_ptr(), inputs, outputs)
        self._kept = (weight, corrections)
        self._outputs = outputs
        self._frame = (ctypes.c_int64 * len(fields))(*fields)
        self._call = compiled_product().long("multiply")

    def __call__(self, rows: torch.Tensor, threads: int) -> torch.Tensor:
        """Multiplies.

        Args:
            rows: uint8 `[rows, inputs]`, contiguous: signed bytes, with ZERO_POINT added.
            threads: How many may take part.

        Returns:
            The exact sums, int32 `[rows, outputs]`, contiguous and nobody else's.
        """
        count = rows.shape[0]
        sums = torch.empty((count, self._outputs), dtype=torch.int32)
        self._call(ctypes.addressof(self._frame), rows.data_ptr(), sums.data_ptr(), count, threads)
        return sums


@functools.cache
def compiled_product() -> Compiled:
    """The function, which all weights share."""
    program = Program(("weight", "corrections", "inputs", "outputs"), ("rows", "product", "count", "threads"))
    program.function("multiply", _multiply)
    return program.compile()


def _multiply(code: Sweep) -> None:
    blocks = (code.field("outputs") + (BLOCK - 1)) // BLOCK
    code.sweep(blocks, code.argument("threads"), _multiply_block)


def _multiply_block(code: Sweep, block: Value) -> None:
    """All rows with one block of outputs: by ROWS at a time, then what is left by halves."""
    count = code.argument("count")
    whole = count - count % ROWS
    with code.loop(0, whole, ROWS) as first:
        _multiply_tile(code, block, first, ROWS)
    for bit in reversed(range(ROWS.bit_length() - 1)):
        rows = 1 << bit
        with code.when((count & rows).differs(0)):
            # As many are done as the higher bits of the count say.
            _multiply_tile(code, block, count - count % (2 * rows), rows)


def _multiply_tile(code: Sweep, block: Value, first: Value, rows: int) -> None:
    inputs, outputs = code.field("inputs"), code.field("outputs")
    weight = code.array("weight", I8).at(block * (inputs * BLOCK))
    bytes_ = [code.pointed(code.argument("rows"), I8).at((first + row) * inputs) for row in range(rows)]
    corrections = code.array("corrections", I32).at(block * BLOCK)
    sums = [
        [Variable(code, corrections.gather(vector * LANES)) for vector in range(VECTORS)] for _ in range(rows)
    ]
    with code.loop(0, inputs, WORD) as place:
        pieces = [weight.at(place * BLOCK).words(vector * LANES * WORD) for vector in range(VECTORS)]
        for row, held in zip(bytes_, sums, strict=True):
            word = code.spread(row.word(place))
            for total, piece in zip(held, pieces, strict=True):
                total.set(code.dot(total.get(), word, piece))
    for number, held in enumerate(sums):
        line = code.pointed(code.argument("product"), I32).at((first + number) * outputs)
        for vector, total in enumerate(held):
            _store(code, line, block * BLOCK + vector * LANES, total.get())


def _store(code: Sweep, product: Array, output: Value, sums: Value) -> None:
    """Writes the sums of LANES outputs, or of those that there are."""
    rest = code.field("outputs") - output
    code.either(
        rest >= LANES,
        lambda: product.spill(output, sums),
        lambda: Lane(code, output, code.select(rest > 0, rest, code.number(0, I64))).store(product, sums),
    )
