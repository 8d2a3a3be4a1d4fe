"""What one machine gives to its models: the same to a later revision as to the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import SecretStr

from services.worker.adapters import torch_compute
from services.worker.config import WorkerConfig
from tests.fakes import tiny_models


@pytest.mark.parametrize("kv_cache_bytes", [0, 512 * 320], ids=["measured", "given"])
def test_a_later_revision_has_the_cache_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache_bytes: int
) -> None:
    """Though it is loaded while the first one holds most of the memory: prompts that fitted fit again."""
    free = [512 * 320 * torch_compute.KV_CACHE_SHARE, 512 * 64]
    # What the machine has left is the system's to say.
    monkeypatch.setattr(torch_compute, "available_bytes", lambda: free.pop(0))
    config = WorkerConfig(
        mesh_token=SecretStr("m" * 64), cache_forms_bytes=0, slots=8, kv_cache_bytes=kv_cache_bytes
    )
    loader = torch_compute.make_loader(config, torch.device("cpu"), 1)
    spec = tiny_models.save("llama", tmp_path)
    first, second = (loader.load(tmp_path, spec).facts.kv_tokens for _ in range(2))
    assert 0 < first == second
    # It was the budget that decided, and not how much the slots could fill.
    assert first < 8 * 64


def test_on_a_card_what_torch_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's figure knows nothing of tensors that are gone, unless torch gives their memory back."""
    kept = [3 << 30]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((4 << 30) - sum(kept), 8 << 30))
    kv_bytes = torch_compute.kv_budget(0, torch.device("cuda"))
    assert kv_bytes() == (4 << 30) // torch_compute.KV_CACHE_SHARE
