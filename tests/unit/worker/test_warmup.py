"""Warm-up: a loaded revision shows that it generates, in whatever cache it has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.common.errors import ArtifactInvalid
from services.worker.core.kv_budget import BUCKET_TOKENS
from services.worker.core.warmup import PROMPT_TOKENS, SEQUENCES, TOKENS, warm
from tests.fakes.worker_ports import FACTS, FakeRunner


def runner_with(kv_tokens: int) -> FakeRunner:
    """A runner whose KV cache has this area."""
    return FakeRunner(replace(FACTS, kv_tokens=kv_tokens))


def test_several_sequences_decode_together() -> None:
    """As serving lets them."""
    runner = runner_with(SEQUENCES * BUCKET_TOKENS)
    warm(runner)
    assert max(len(batch.decodes) for batch in runner.batches) == SEQUENCES


def test_a_cache_for_one_sequence_warms_up_with_one() -> None:
    """It generates all its tokens, though another has no room beside it."""
    runner = runner_with(BUCKET_TOKENS)
    warm(runner)
    assert runner.computed_tokens == PROMPT_TOKENS + TOKENS - 1


@pytest.mark.parametrize("kv_tokens", [0, BUCKET_TOKENS - 1])
def test_a_cache_without_room_ends_the_warm_up(kv_tokens: int) -> None:
    """No step is made, and whoever reads it learns what to do."""
    runner = runner_with(kv_tokens)
    # Steps without end would be the alternative.
    runner.error = AssertionError("a step was made")
    with pytest.raises(ArtifactInvalid, match="set kv_cache_bytes"):
        warm(runner)
    assert not runner.batches
