"""Integer products with few rows. Owns: the function that reads a weight once, as it lies, for all of them.

So few rows take as long as it takes to read the weight. A matrix library prepares for many: it takes a
quarter longer for one row, half as long again for two.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from llvmlite import binding

from services.worker.adapters.vector_code import I8, I32, LANES, Value, Variable
from services.worker.adapters.vector_program import Compiled, Program, Sweep

# From here on the processor's own order of the weight is worth a copy.
ROWS_MAX = 8

# Bytes that one instruction multiplies.
STEP = 4 * LANES

# Outputs that a thread takes at a time.
BLOCK = 16

# Unsigned bytes are multiplied with signed ones, and zero is in the middle. Turning the highest bit of a
# signed byte adds as much.
ZERO_POINT = 128

_COUNTS = (1, 2, 4, 8)


class FewRows:
    """A product of up to ROWS_MAX rows with a weight.

    Args:
        weight: int8, `[outputs, inputs]`; `serves` must say so.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        sums = weight.sum(1, dtype=torch.int32)
        fields = (weight.data_ptr(), sums.data_ptr(), inputs, outputs)
        self._kept = (weight, sums)
        self._outputs = outputs
        self._frame = (ctypes.c_int64 * len(fields))(*fields)
        self._call = [_compiled().long(f"rows_{count}") for count in _COUNTS]

    def flip(self, rows: int) -> int:  # noqa: ARG002 - the port's signature
        """See `integer_products.IntegerProduct`."""
        return ZERO_POINT

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See `integer_products.IntegerProduct`; int32."""
        count = rows.shape[0]
        sums = torch.empty((count, self._outputs), dtype=torch.int32)
        call = self._call[(count - 1).bit_length()]
        call(ctypes.addressof(self._frame), rows.data_ptr(), sums.data_ptr(), count, torch.get_num_threads())
        return sums

    @property
    def bytes(self) -> int:
        """Memory of the weight."""
        return self._kept[0].nbytes


def serves(weight: torch.Tensor) -> bool:
    """Whether a weight can be multiplied so on this processor."""
    return bool(binding.get_host_cpu_features().get("avx512vnni")) and weight.shape[1] % STEP == 0


@functools.cache
def _compiled() -> Compiled:
    program = Program(("weight", "sums", "inputs", "outputs"), ("rows", "product", "count", "threads"))
    for count in _COUNTS:
        program.function(f"rows_{count}", functools.partial(_multiply, count))
    return program.compile()


def _multiply(rows: int, code: Sweep) -> None:
    blocks = (code.field("outputs") + (BLOCK - 1)) // BLOCK
    code.sweep(blocks, code.argument("threads"), functools.partial(_multiply_block, rows))


def _multiply_block(rows: int, code: Sweep, block: Value) -> None:
    outputs, inputs = code.field("outputs"), code.field("inputs")
    first = block * BLOCK
    rest = outputs - first
    count = code.argument("count")
    bytes_, weight = code.pointed(code.argument("rows"), I8), code.array("weight", I8)
    product, sums = code.pointed(code.argument("product"), I32), code.array("sums", I32)
    with code.loop(first, first + code.select(rest > BLOCK, BLOCK, rest)) as output:
        totals = [Variable(code, code.filled(0, I32)) for _ in range(rows)]
        line = weight.at(output * inputs)
        with code.loop(0, inputs, STEP) as place:
            pieces = line.words(place)
            for row, total in enumerate(totals):
                total.set(code.dot(total.get(), bytes_.at(inputs * row).words(place), pieces))
        excess = sums.get(output) * ZERO_POINT
        for row, total in enumerate(totals):
            with code.when(count > row):
                product.put(outputs * row + output, code.total(total.get()) - excess)
