"""Products with packed weights: exact, inside their bounds, with and without the processor's instruction."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch

from services.worker.adapters import packed_product, vector_code
from services.worker.adapters.packed_product import BLOCK, WORD, ZERO_POINT, PackedProduct, packed


@pytest.fixture(params=[True, False], autouse=True)
def instruction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the instruction for four bytes at once where there is one, and without."""
    if request.param and not vector_code.DOTS:
        pytest.skip("the processor has no such instruction")
    monkeypatch.setattr(vector_code, "DOTS", request.param)
    packed_product.compiled_product.cache_clear()
    yield
    packed_product.compiled_product.cache_clear()


def case(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, rows, and the sums; also of integers at their ends, where sums cut at 16 bits would show."""
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    weight[: outputs // 2] = 127
    integers = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    integers[0] = 127
    return weight, integers.view(torch.uint8) ^ ZERO_POINT, (integers.double() @ weight.double().t()).int()


@pytest.mark.parametrize("outputs", [1, BLOCK - 1, BLOCK, BLOCK + 17, 4_099])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_sums_are_exact(rows: int, outputs: int, threads: int) -> None:
    """For any count of rows and outputs, on any count of threads."""
    weight, unsigned, wanted = case(rows, outputs, 100)
    assert torch.equal(PackedProduct(packed(weight), outputs)(unsigned, threads), wanted)


def guarded(tensor: torch.Tensor, kept: list[mmap.mmap]) -> torch.Tensor:
    """A copy whose last byte is the last one of a page; the next page may not be touched."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    kept.append(area)
    end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, BLOCK, BLOCK + 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 9, 15])
def test_nothing_behind_the_ends_is_touched(rows: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weight, rows and sums: this process would end."""
    kept: list[mmap.mmap] = []
    weight, unsigned, wanted = case(rows, outputs, 60)
    product = PackedProduct(guarded(packed(weight), kept), outputs)
    rows_guarded = guarded(unsigned, kept)
    with monkeypatch.context() as patched:
        real = torch.zeros
        patched.setattr(torch, "empty", lambda size, dtype: guarded(real(size, dtype=dtype), kept))
        found = product(rows_guarded, 1)
    assert torch.equal(found, wanted)


def test_inputs_that_are_no_whole_words_are_refused() -> None:
    """Whoever loads a model asks first."""
    with pytest.raises(ValueError, match="multiple"):
        packed(torch.zeros((3, WORD + 1), dtype=torch.int8))
