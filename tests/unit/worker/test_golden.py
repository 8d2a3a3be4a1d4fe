"""Golden prompts: a loaded revision answers what it must, or is not ready."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.common.errors import ArtifactInvalid
from services.worker.core.golden import answer_all
from services.worker.core.revision import GoldenPrompt
from tests.fakes.worker_ports import FACTS, FakeRunner, continuation


class Tokenizer:
    """An id a character; an answer is its ids, with commas between them."""

    def encode_user(self, text: str) -> tuple[int, ...]:
        """See `ChatTokenizer.encode_user`."""
        return tuple(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `ChatTokenizer.decode`."""
        return ",".join(map(str, token_ids))


def answer(text: str, tokens: int) -> str:
    """What the fake model says to a text."""
    return ",".join(map(str, continuation([ord(one) for one in text], tokens)))


def never() -> bool:
    """Somebody waits."""
    return False


def test_answers_that_contain_what_they_must() -> None:
    """Each is generated to its own length, the prompt as the template renders it."""
    prompts = [
        GoldenPrompt("one", answer("one", 5), 5),
        GoldenPrompt("two", answer("two", 8)[3:-2], 8),
    ]
    runner = FakeRunner()
    answer_all(runner, Tokenizer(), prompts, never)
    assert runner.computed_tokens >= 3 + 4 + 3 + 7


def test_the_first_answer_that_lacks_it_is_named() -> None:
    """By its number: neither what was asked nor what was answered is told."""
    prompts = [GoldenPrompt("one", answer("one", 5), 5), GoldenPrompt("secret", "forty-two", 5)]
    with pytest.raises(ArtifactInvalid, match="Golden prompt 2 of 2") as caught:
        answer_all(FakeRunner(), Tokenizer(), prompts, never)
    assert "secret" not in caught.value.message
    assert "forty-two" not in caught.value.message


def test_what_comes_after_the_bound_does_not_count() -> None:
    """An answer is cut at its most tokens."""
    late = answer("one", 6).rpartition(",")[2]
    assert late not in answer("one", 5).split(",")
    with pytest.raises(ArtifactInvalid):
        answer_all(FakeRunner(), Tokenizer(), [GoldenPrompt("one", f",{late}", 5)], never)


def test_one_that_cannot_fit() -> None:
    """It is refused before a step is made."""
    runner = FakeRunner()
    prompt = GoldenPrompt("x" * FACTS.context_tokens, "y", 1)
    with pytest.raises(ArtifactInvalid, match="longer than"):
        answer_all(runner, Tokenizer(), [prompt], never)
    assert not runner.batches


def test_nobody_waits_any_more() -> None:
    """An aborted preparation ends within a step, whatever the answer would have been."""
    runner = FakeRunner()
    answer_all(runner, Tokenizer(), [GoldenPrompt("one", "nothing", 50)], lambda: len(runner.batches) >= 3)
    assert len(runner.batches) == 3
