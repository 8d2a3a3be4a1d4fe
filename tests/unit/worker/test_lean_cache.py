"""The lean cache: rows that cost nothing until they are used, and what survives when it is made anew."""

from __future__ import annotations

import resource

import pytest
import torch

from services.worker.adapters.lazy_memory import lazy_zeros
from services.worker.adapters.lean_cache import CacheShape, LeanCache, spread
from services.worker.adapters.torch_cache import GROWTH_TOKENS, Rows

SHAPE = CacheShape(2, 3, 4, torch.float32, torch.device("cpu"))


def write(cache: LeanCache, row: int, tokens: int, value: float) -> None:
    """Writes `tokens` positions of a row, in all layers."""
    place = cache.look([row], [0], tokens)
    for layer in range(SHAPE.layers):
        states = torch.full((tokens, 2 * SHAPE.heads, SHAPE.head_dim), value)
        cache.write(layer, states, cache.targets(place))


def read(cache: LeanCache, row: int, length: int) -> torch.Tensor:
    """The keys and values of a row, in all layers."""
    place = cache.look([row], [length - 1], 1)
    found = [torch.stack(cache.read(layer, place))[:, :, :length] for layer in range(SHAPE.layers)]
    return torch.stack(found)


def test_all_rows_are_there_from_the_first_on() -> None:
    """More rows make nothing anew; a longer sequence does, and keeps what every row holds."""
    cache = LeanCache(SHAPE, 64 * GROWTH_TOKENS)
    cache.ensure(1, 16)
    first = cache.layers[0]
    assert (cache.rows, cache.capacity) == (64, GROWTH_TOKENS)
    write(cache, 0, 16, 1.0)
    cache.ensure(64, GROWTH_TOKENS)
    assert cache.layers[0] is first
    write(cache, 40, 30, 2.0)
    cache.ensure(3, GROWTH_TOKENS + 1)
    assert (cache.rows, cache.capacity) == (32, 2 * GROWTH_TOKENS)
    assert torch.all(read(cache, 0, 16) == 1.0)
    # Row 40 lies beyond what the budget has for rows of this length.
    assert torch.all(read(cache, 31, 40) == 0.0)


def test_rows_come_before_length_where_both_have_no_room() -> None:
    """Twice as long where it fits, as long as is needed where it does not, and never over the budget."""
    area = 4 * GROWTH_TOKENS
    assert spread((0, 0), (1, 10), area) == (4, GROWTH_TOKENS)
    assert spread((4, GROWTH_TOKENS), (2, GROWTH_TOKENS + 1), area) == (2, 2 * GROWTH_TOKENS)
    assert spread((4, GROWTH_TOKENS), (9, 64), area) == (12, 80)
    for rows in range(1, 40):
        for capacity in range(16, area // rows + 1, 16):
            tall, wide = spread((4, GROWTH_TOKENS), (rows, capacity), area)
            assert tall >= rows
            assert wide >= capacity
            assert tall * wide <= area


def test_many_long_sequences_make_it_anew_a_few_times() -> None:
    """Not at each bucket that they grow by, up to the last that the budget has."""
    for rows, area in ((16, 43_008), (33, 65_536), (5, 4_096)):
        size, made = (0, 0), 0
        for length in range(16, area // rows + 1, 16):
            if rows > size[0] or length > size[1]:
                size, made = spread(size, (rows, length), area), made + 1
        assert made <= 16


def test_a_failed_allocation_leaves_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails, and the next one begins with nothing instead of half a cache."""
    cache = LeanCache(SHAPE, 8 * GROWTH_TOKENS)
    cache.ensure(2, 16)
    given = iter([lazy_zeros((2, 4, 3, 512, 4), torch.float32)])

    def short(_: LeanCache) -> torch.Tensor:
        if (tensor := next(given, None)) is None:
            raise MemoryError
        return tensor

    with monkeypatch.context() as patched:
        patched.setattr(LeanCache, "_empty", short)
        with pytest.raises(MemoryError):
            cache.ensure(2, 2 * GROWTH_TOKENS)
    assert (cache.rows, cache.held_bytes) == (0, 0)
    cache.ensure(2, 16)
    write(cache, 1, 16, 1.0)
    assert torch.all(read(cache, 1, 16) == 1.0)


def test_a_cleared_row_is_all_zeros() -> None:
    """Whatever was written, also before the cache was made anew."""
    cache = LeanCache(SHAPE, 8 * GROWTH_TOKENS)
    cache.ensure(2, 16)
    write(cache, 1, 16, float("nan"))
    cache.ensure(2, 2 * GROWTH_TOKENS)
    cache.clear(1)
    assert torch.all(cache.layers[1][:, 1] == 0.0)


def test_a_moved_row_is_kept_when_the_cache_is_made_anew() -> None:
    """What was copied to a row counts as written there."""
    cache = LeanCache(SHAPE, 8 * GROWTH_TOKENS)
    cache.ensure(2, 16)
    write(cache, 0, 16, 3.0)
    cache.move(0, 1, 12)
    cache.ensure(2, 2 * GROWTH_TOKENS)
    assert torch.all(read(cache, 1, 12) == 3.0)


@pytest.mark.parametrize("rows", [[2], [0, 1, 2], [1, 3, 7], [5, 9]])
def test_rows_are_taken_as_they_are_named(rows: list[int]) -> None:
    """Contiguous or not, and without a copy of what lies behind them."""
    tensor = torch.arange(2 * 10 * 3).view(2, 10, 3)
    assert torch.equal(Rows.of(rows, tensor.device).taken(tensor, 1), tensor[:, rows])


def test_zeros_take_no_memory_until_they_are_written() -> None:
    """A gigabyte of them costs less than a hundredth of it."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zeros = lazy_zeros((1 << 28,), torch.float32)
    zeros[-4:] = 1.0
    assert zeros[-5:].tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 10_000
