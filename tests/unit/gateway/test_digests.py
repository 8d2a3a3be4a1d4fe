"""Names of what requests ask: those of earlier versions, and made within a moment."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest

from services.common.conversation import Message
from services.gateway.core.params import (
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    Prompt,
    RawPrompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from services.gateway.core.payload import digest_of


@pytest.mark.parametrize(
    ("prompt", "digest"),
    [
        (TokenPrompt((1, 2, 70_000)), "fb26b798b37ea1bc"),
        (TokenPrompt(()), "36c7d1cb082d8eed"),
        (TextPrompt("hé\n"), "71949a9733a52dc4"),
        (RawPrompt("hé\n"), "9893ad67f558b122"),
        (ChatPrompt((Message("user", "hi"), Message("assistant", "hé"))), "6b8866238f6a89bd"),
        (None, "6f0e8b08106fcfe1"),
    ],
    ids=["tokens", "no tokens", "text", "raw", "chat", "nothing"],
)
def test_a_digest_is_that_of_earlier_versions(prompt: Prompt | None, digest: str) -> None:
    """A repetition may reach a gateway of another version than its first try, while a mesh is updated."""
    request = GenerationRequest(
        request_id="mine",
        prompt=prompt,
        sampling=SamplingParams(seed=3, logit_bias=((1, 2.0),)),
        stop=("a", "b"),
        form=OutputFormat(FormatKind.CHOICE, ("x", "y")),
    )
    assert digest_of("m", request)[:16] == digest


def test_the_ids_of_a_long_prompt_are_not_copied_one_by_one() -> None:
    """The loop makes the digest: a prompt as long as a context may be shall not hold up anybody's tokens."""
    request = GenerationRequest(request_id="mine", prompt=TokenPrompt(tuple(range(131_072))))
    began_s = time.thread_time()
    digest_of("m", request)
    taken_s = time.thread_time() - began_s
    began_s = time.thread_time()
    asdict(request)
    assert taken_s < time.thread_time() - began_s
