"""The fused runner: what it refuses, what it forgets, and for whom it makes room."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.adapters.fused_decoder import FusedDecoder
from services.worker.adapters.fused_runner import FusedRunner
from services.worker.adapters.lean_cache import LeanRows
from services.worker.core.batch import Batch, Chunk, Decode, Draw
from services.worker.core.revision import Quantization
from services.worker.core.sequence import Sampling
from tests.fakes import tiny_models
from tests.unit.worker.test_lean_forward import load

DRAW = Draw(Sampling(), 0, 0)
PROMPT = (3, 4, 5, 6, 7)


@pytest.fixture
def runner(tmp_path: Path) -> FusedRunner:
    """A tiny model's runner, with four rows of 256 positions that have been used."""
    tiny_models.save("llama", tmp_path)
    made = load(tmp_path, Quantization.INT8)
    assert isinstance(made, FusedRunner)
    made.step(Batch(4, 256, (), (Chunk(0, 0, PROMPT, DRAW),), ()))
    return made


@pytest.mark.parametrize(("row", "beyond"), [(0, 0), (0, 40), (-1, -100), (10_000, -100)])
def test_a_token_outside_of_the_cache_is_refused(runner: FusedRunner, row: int, beyond: int) -> None:
    """The functions would write there."""
    capacity = runner._cache.capacity  # type: ignore[attr-defined]
    with torch.inference_mode(), pytest.raises(ValueError, match="outside"):
        runner.decode([Decode(row, capacity + beyond, 3, DRAW)])


def test_a_failed_growth_keeps_no_memory(runner: FusedRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even through what passes point to: the next step has room again."""
    rows = runner._cache
    assert isinstance(rows, LeanRows)
    held = [weakref.ref(layer) for layer in rows.layers]
    made = LeanRows._empty
    calls = iter([True])

    def short(self: LeanRows) -> torch.Tensor:
        if next(calls, None):
            return made(self)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(LeanRows, "_empty", short)
        with pytest.raises(MemoryError):
            runner.step(Batch(4, 2 * rows.capacity, (), (Chunk(0, 0, PROMPT, DRAW),), ()))
    assert [one() for one in held] == [None] * len(held)
    (choice,) = runner.step(Batch(4, 256, (), (Chunk(0, 0, PROMPT, DRAW),), ()))
    assert choice.token_id >= 0


def test_nothing_drawn_is_nothing_computed(runner: FusedRunner) -> None:
    """A chunk that goes on yields no logits."""
    with torch.inference_mode():
        assert runner.forward(Batch(4, 256, (), (Chunk(1, 0, PROMPT, None),), ())) == ([], [])
        assert runner.forward(Batch(4, 256, (), (), ())) == ([], [])


@pytest.mark.parametrize("name", ["norm", "embedding", "head", "layers"])
def test_tensors_of_other_sizes_are_refused(runner: FusedRunner, name: str) -> None:
    """The functions would read behind them."""
    decoder = runner._decoder
    layer = decoder.layers[0]
    wrong: dict[str, Any] = {
        "norm": torch.ones(63),
        "embedding": torch.ones(96, 60),
        "head": layer.down,
        "layers": (replace(layer, output=layer.qkv),),
    }
    changed: FusedDecoder = replace(decoder, **{name: wrong[name]})
    with pytest.raises(ValueError, match="not"):
        changed.check()
