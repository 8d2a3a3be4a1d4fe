"""The documented bounds, one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interlock.v1 import generation_pb2

from services.common.conversation import Message
from services.common.errors import (
    ArgumentInvalid,
    ContextExceeded,
    ModelUnknown,
    NoWorker,
    ScopeMissing,
)
from services.gateway.core import validation
from services.gateway.core.catalog import Catalog, CatalogEntry
from services.gateway.core.jobs import Band, Principal
from services.gateway.core.params import (
    ChatPrompt,
    FormatKind,
    GenerationRequest,
    OutputFormat,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from tests.fakes.gateway_ports import FakeTokenizer

TEXT = TextPrompt("hi")
HUGE = "x" * (validation.PROMPT_BYTES_MAX + 1)
# What a client that speaks protobuf sends for 0.01.
SINGLE = generation_pb2.SamplingParams(repetition_penalty=0.01).repetition_penalty


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0.0, 2.0], [-0.1, 2.1]),
        ("top_p", [0.01, 1.0], [0.0, 1.1]),
        ("top_k", [1, 2**31 - 1], [0, -1, 2**31]),
        ("min_p", [0.0, 1.0], [-0.1, 1.1]),
        ("repetition_penalty", [0.01, SINGLE, 1.0, 10.0], [0.0, 1e-38, 0.0099, 10.1]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1]),
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
    ],
)
def test_sampling_is_bounded(name: str, good: list[Any], bad: list[Any]) -> None:
    """Both ends of each range are allowed or refused as documented; NaN and infinity never are."""
    for value in good:
        validation.check_sampling(SamplingParams(**{name: value}))
    numbers = [] if name in {"top_k", "seed"} else [math.nan, math.inf, -math.inf]
    for value in [*bad, *numbers]:
        with pytest.raises(ArgumentInvalid, match=name):
            validation.check_sampling(SamplingParams(**{name: value}))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 0}, "n:"),
        ({"n": 5}, "n:"),
        ({"logprobs": 21}, "logprobs"),
        (
            {"logprobs": 20, "n": 4, "max_tokens": 3_121},
            "logprobs: n x max_tokens x (1 + alternatives) is 262164",
        ),
        ({"logprobs": 0, "max_tokens": validation.SCORES_MAX + 1}, "logprobs: n x"),
        ({"stop": ("a",) * 5}, "stop"),
        ({"stop": ("é" * 129,)}, "stop"),
        ({"stop": ("a",) * 65, "stops_max": validation.UNBOUNDED_STOPS_MAX}, "stop: at most 64"),
        ({"prompt": TextPrompt("")}, "text"),
        ({"prompt": TextPrompt(HUGE)}, "text"),
        ({"prompt": TextPrompt("\ud800")}, "text"),
        ({"prompt": TokenPrompt(())}, "tokens"),
        ({"prompt": ChatPrompt(())}, "messages"),
        ({"prompt": ChatPrompt((Message("", "a"),))}, "messages[0].role"),
        ({"prompt": ChatPrompt((Message("r" * 65, "a"),))}, "messages[0].role"),
        ({"prompt": ChatPrompt((Message("user", "a"),) * 1025)}, "messages"),
        ({"prompt": ChatPrompt((Message("user", HUGE),))}, "messages"),
    ],
    ids=range(17),
)
def test_a_breach_names_its_field(fields: dict[str, Any], named: str) -> None:
    """ArgumentInvalid begins with the field."""
    with pytest.raises(ArgumentInvalid) as caught:
        validation.check_request(GenerationRequest(**{"prompt": TEXT, **fields}))
    assert caught.value.message.startswith(named)


def test_many_scores_are_within_the_bound() -> None:
    """A few thousand tokens with all alternatives, of as many sequences as there may be; more without."""
    for asked in (
        GenerationRequest(prompt=TEXT, logprobs=20, n=4),
        GenerationRequest(prompt=TEXT, logprobs=20, n=4, max_tokens=3_120),
        GenerationRequest(prompt=TEXT, logprobs=20, max_tokens=12_480),
        GenerationRequest(prompt=TEXT, logprobs=0, n=2, max_tokens=131_072),
        GenerationRequest(prompt=TEXT, n=4, max_tokens=10**9),
    ):
        validation.check_request(asked)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (FormatKind.JSON_SCHEMA, ['{"type": "string"}', "true"], ["", "{", "7", "[]", "[" * 50_000]),
        (FormatKind.JSON_SCHEMA, [f'{{"title": "{"x" * 60_000}"}}'], [f'{{"title": "{"x" * (1 << 20)}"}}']),
        (FormatKind.REGEX, ["a+", "a" * 4096], ["", "a" * 4097, "é" * 2049, "\ud800"]),
        (FormatKind.CHOICE, ["a", "x" * 1024], ["", "x" * 1025]),
        (FormatKind.GRAMMAR, ['root ::= "a"'], ["", "x" * (1 + (1 << 16))]),
    ],
    ids=range(5),
)
def test_formats_are_bounded(kind: FormatKind, good: list[str], bad: list[str]) -> None:
    """Sizes of each kind as documented, and a schema must be JSON that can be a schema."""
    for text in good:
        validation.check_format(OutputFormat(kind, (text,)))
    for text in bad:
        with pytest.raises(ArgumentInvalid, match=f"format.{kind}"):
            validation.check_format(OutputFormat(kind, (text,)))


def test_a_format_has_one_kind_and_few_choices() -> None:
    """None named, no choice, and one more choice than allowed are refused."""
    many = OutputFormat(FormatKind.CHOICE, ("a",) * 257)
    for form in (OutputFormat(None), OutputFormat(FormatKind.CHOICE), many):
        with pytest.raises(ArgumentInvalid, match="format"):
            validation.check_format(form)


def test_a_bias_is_bounded() -> None:
    """Number of entries, size of each, and ids of the model."""
    entries = tuple((token_id, 1.0) for token_id in range(1_025))
    validation.check_sampling(SamplingParams(logit_bias=entries[:1_024]))
    for bad in (entries, ((1, 100.1),), ((1, math.nan),), ((1, -math.inf),)):
        with pytest.raises(ArgumentInvalid, match="logit_bias"):
            validation.check_sampling(SamplingParams(logit_bias=bad))
    validation.check_biased_ids(SamplingParams(logit_bias=((9, 1.0),)), 10)
    with pytest.raises(ArgumentInvalid, match="logit_bias"):
        validation.check_biased_ids(SamplingParams(logit_bias=((10, 1.0),)), 10)


@given(st.none() | st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_prompt_and_answer_fit_the_context(asked: int | None, prompt: int, context: int) -> None:
    """What is returned fits and is what was asked for; what cannot fit is refused."""
    try:
        granted = validation.fit_max_tokens(asked, prompt, context)
    except ContextExceeded:
        assert prompt + (asked or 1) > context
    else:
        assert 1 <= granted <= context - prompt
        assert granted == (min(50, context - prompt) if asked is None else asked)


def test_the_system_band_needs_its_scope() -> None:
    """Absent is INTERACTIVE; numbers that the contract does not know are refused."""
    nobody, system = Principal("a"), Principal("a", frozenset({"priority:system"}))
    assert validation.band_of(0, nobody) is Band.INTERACTIVE
    assert validation.band_of(3, system) is Band.SYSTEM
    with pytest.raises(ScopeMissing):
        validation.band_of(3, nobody)
    with pytest.raises(ArgumentInvalid):
        validation.band_of(9, nobody)


def test_the_catalog_knows_the_latest_epoch() -> None:
    """An older activation changes nothing; the first model is the default; unknown names are told."""
    catalog = Catalog()
    with pytest.raises(NoWorker):
        catalog.find(None)
    for model, revision, epoch in (("m", "r2", 2), ("m", "r1", 1), ("a", "r1", 1)):
        catalog.activate(CatalogEntry(model, revision, epoch, 10, 1, FakeTokenizer()))
    assert catalog.find(None).revision == "r2"
    assert catalog.models == ("a", "m")
    with pytest.raises(ModelUnknown, match="'x' is not served; a, m"):
        catalog.find("x")


def test_aliases_mean_a_model_and_nothing_else_does() -> None:
    """The first pattern that fits counts; a name that none fits, the empty one too, is unknown."""
    catalog = Catalog((("gpt-*", ""), ("gpt-4", "b"), ("claude-*", "b")))
    for model in ("a", "b"):
        catalog.activate(CatalogEntry(model, "r", 1, 10, 1, FakeTokenizer()))
    assert [catalog.find(name).model for name in ("gpt-4", "claude-x", "a", "b")] == ["a", "b", "a", "b"]
    for name in ("", "other"):
        with pytest.raises(ModelUnknown):
            catalog.find(name)
