"""The cache of the library's modules: what is left where the memory for more of it is not there."""

from __future__ import annotations

import pytest
import torch

from services.worker.adapters import torch_cache
from services.worker.adapters.torch_cache import GROWTH_TOKENS, SlotCache

LAYERS, HEADS, HEAD_DIM = 3, 2, 4


def write(cache: SlotCache, row: int, tokens: int, value: float) -> list[torch.Tensor]:
    """Writes `tokens` positions of a row in all layers; returns the keys and values that attention reads."""
    cache.look([row], [0], tokens)
    states = torch.full((1, HEADS, tokens, HEAD_DIM), value)
    return [one for layer in range(LAYERS) for one in cache.update(states, states, layer)]


@pytest.mark.parametrize("given", range(2 * LAYERS))
def test_a_failed_growth_leaves_an_empty_cache(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails, and the next one begins with nothing instead of layers of two sizes."""
    cache = SlotCache(LAYERS, torch.device("cpu"))
    cache.area_tokens = 8 * GROWTH_TOKENS
    cache.ensure(2, 16)
    write(cache, 1, 16, 1.0)
    before, resized, left = cache.bytes_per_token, torch_cache._resized, iter(range(given))

    def short(tensor: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        if next(left, None) is None:
            raise MemoryError
        return resized(tensor, rows, capacity)

    with monkeypatch.context() as patched:
        patched.setattr(torch_cache, "_resized", short)
        with pytest.raises(MemoryError):
            cache.ensure(2, 2 * GROWTH_TOKENS)
    assert (cache.rows, cache.capacity, cache.held_bytes) == (0, 0, 0)
    cache.ensure(2, 2 * GROWTH_TOKENS)
    read = write(cache, 1, 2 * GROWTH_TOKENS, 2.0)
    assert all(one.shape == (1, HEADS, 2 * GROWTH_TOKENS, HEAD_DIM) for one in read)
    assert all(torch.all(one == 2.0) for one in read)
    assert cache.bytes_per_token == before
