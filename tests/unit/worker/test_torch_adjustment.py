"""Bias, penalties, masks and scores: each equals its plain formula, and no row sees another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interlock.v1 import generation_pb2

from services.worker.adapters.torch_adjustment import adjusted, score
from services.worker.adapters.torch_sampler import NOTHING_FITS, sample
from services.worker.core.admission import find_flaw
from services.worker.core.batch import Choice, Draw
from services.worker.core.format import ConstraintBroken
from services.worker.core.revision import ModelFacts
from services.worker.core.scheduler import NO_TOKEN
from services.worker.core.sequence import Sampling, SequenceKey, SequenceStart

VOCABULARY = 40
BROKEN = "format.regex: too much"


class ListConstraint:
    """Allows the same tokens whatever came before; none: it is broken."""

    def __init__(self, *allowed: int) -> None:
        self._allowed = allowed

    def allowed(self, emitted_ids: Sequence[int]) -> bytes:
        """See `Constraint.allowed`."""
        del emitted_ids
        if not self._allowed:
            raise ConstraintBroken(BROKEN)
        bits = np.zeros(max(self._allowed) + 1, np.uint8)
        bits[list(self._allowed)] = 1
        return np.packbits(bits, bitorder="little").tobytes()


def expected(logits: Sequence[float], draw: Draw) -> list[float]:
    """The formulas of the contract, one token at a time."""
    sampling, emitted = draw.sampling, list(draw.emitted_ids)
    found = []
    for token, logit in enumerate(logits):
        value = logit + dict(sampling.logit_bias).get(token, 0.0)
        if token in draw.history:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        if token in emitted:
            value -= sampling.presence_penalty + sampling.frequency_penalty * emitted.count(token)
        found.append(value)
    return found


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 99),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.25]),
    logit_bias=st.dictionaries(
        st.integers(0, VOCABULARY - 1), st.floats(-100, 100, width=32), max_size=3
    ).map(lambda entries: tuple(sorted(entries.items()))),
)
histories = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Any draw."""
    history = draw(histories)
    constraint = draw(st.sampled_from([None, ListConstraint(3), ListConstraint(1, 7, 30), ListConstraint()]))
    return Draw(
        draw(samplings),
        0,
        len(history),
        history,
        draw(st.integers(1, len(history))),
        draw(st.sampled_from([None, 0, 5])),
        constraint,
    )


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    """Random logits."""
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@given(draws(), st.integers(0, 1_000))
@settings(max_examples=100)
def test_adjustments_equal_their_formulas(draw: Draw, seed: int) -> None:
    """Bias, then repetition over prompt and output, then presence and frequency over the output alone."""
    (row,) = logits_of(seed)
    values, _ = adjusted(row, draw)
    wanted = torch.tensor(expected(row.tolist(), draw))
    if draw.constraint is not None:
        allowed = getattr(draw.constraint, "_allowed")  # noqa: B009 - the fake's own list
        hidden = [token for token in range(VOCABULARY) if token not in allowed]
        wanted[hidden] = -math.inf
    torch.testing.assert_close(values, wanted)


@given(st.lists(draws(), min_size=2, max_size=6), st.integers(0, 1_000))
@settings(max_examples=60)
def test_neighbours_do_not_matter(together: list[Draw], seed: int) -> None:
    """Each row's token and score are those that it has alone, bit for bit; the logits stay as they were."""
    logits = logits_of(seed, len(together))
    before = logits.clone()
    found = sample(logits, together)
    assert torch.equal(logits, before)
    assert found == [sample(logits[row : row + 1], [draw])[0] for row, draw in enumerate(together)]


# The ends of what may be asked, as they arrive: in single precision.
SMALLEST = generation_pb2.SamplingParams(temperature=1e-5, repetition_penalty=0.01)
extremes = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-45, 2e-38, 9.9e-6, SMALLEST.temperature, 1e-4, 2.0]),
    top_k=st.sampled_from([0, 1]),
    top_p=st.sampled_from([1.0, 1e-38]),
    min_p=st.sampled_from([0.0, 1e-38, 1.0]),
    seed=st.integers(0, 99),
    repetition_penalty=st.sampled_from([SMALLEST.repetition_penalty, 1.0, 10.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 100.0])).map(
        lambda entries: tuple(sorted(entries.items()))
    ),
)


@given(extremes, histories, st.integers(1, 50_000), st.sampled_from([0.1, 10.0, 1e4]), st.integers(0, 99))
@settings(max_examples=150)
def test_whatever_is_allowed_has_a_token(
    sampling: Sampling, history: list[int], repeated: int, scale: float, seed: int
) -> None:
    """The extremes together, over answers of any length: numbers stay finite, and what is greedy is so."""
    facts = ModelFacts(VOCABULARY, 64, frozenset(), 64, 1)
    start = SequenceStart(SequenceKey(1, "j"), (1,), 1, sampling=sampling)
    assert find_flaw(start, facts) is None
    said = history + history[-1:] * repeated
    draw = Draw(sampling, 0, len(said), said, 1)
    logits = logits_of(seed) * scale
    values, _ = adjusted(logits[0], draw)
    (choice,) = sample(logits, [draw])
    assert torch.isfinite(values).all()
    assert 0 <= choice.token_id < VOCABULARY
    if sampling.temperature <= 9.9e-6 and sampling.adjusts:
        assert choice.token_id == int(values.argmax())


def test_what_is_too_small_to_divide_by_is_refused() -> None:
    """A repetition penalty of 0.01 is allowed as it arrives, and one just below it is not."""
    facts = ModelFacts(VOCABULARY, 64, frozenset(), 64, 1)
    for penalty, allowed in ((SMALLEST.repetition_penalty, True), (0.0099, False), (1e-38, False)):
        start = SequenceStart(SequenceKey(1, "j"), (1,), 1, sampling=Sampling(repetition_penalty=penalty))
        assert (find_flaw(start, facts) is None) is allowed


def test_a_plain_row_costs_nothing_more() -> None:
    """Rows that ask for nothing yield bare tokens, and share their batch's one pass."""
    logits = logits_of(1, 2)
    asks = Draw(Sampling(logit_bias=((5, 100.0),)), 0, 1, [1], 1, 2)
    plain, biased = sample(logits, [Draw(Sampling(), 0, 0), asks])
    assert plain == Choice(int(logits[0].argmax()))
    assert biased.token_id == 5
    assert biased.score is not None


def test_scores_are_of_the_models_own_distribution() -> None:
    """Log-softmax of raw logits: temperature, bias, penalties and masks do not touch them."""
    (row,) = logits_of(3)
    wanted = torch.log_softmax(row, dim=-1)
    sampling = Sampling(2.0, seed=1, logit_bias=((0, 50.0),), repetition_penalty=3.0)
    draw = Draw(sampling, 0, 2, [1, 2], 1, 4, ListConstraint(9))
    (choice,) = sample(row.unsqueeze(0), [draw])
    assert choice.token_id == 9
    assert choice.score is not None
    assert choice.score.logprob == pytest.approx(float(wanted[9]))
    ranked = sorted(range(VOCABULARY), key=lambda token: -wanted[token])[:4]
    assert [token for token, _ in choice.score.alternatives] == ranked
    assert [value for _, value in choice.score.alternatives] == pytest.approx(wanted[ranked].tolist())


def test_tokens_that_the_model_rules_out_are_no_alternatives() -> None:
    """Minus infinity has no number in JSON: such a token is not named."""
    row = torch.full((VOCABULARY,), -math.inf)
    row[7] = 1.0
    assert score(row, 7, 20).alternatives == ((7, 0.0),)


def test_where_nothing_is_allowed_there_is_no_token() -> None:
    """A broken constraint ends its own row, greedy or drawn, and no other one."""
    broken = [
        Draw(Sampling(temperature, seed=1), 0, 0, [1], 1, 3, ListConstraint()) for temperature in (0, 1)
    ]
    found = sample(logits_of(4, 3), [*broken, Draw(Sampling(), 0, 0)])
    assert found[:2] == [Choice(NO_TOKEN, flaw=BROKEN)] * 2
    assert (found[2].token_id == NO_TOKEN, found[2].flaw) == (False, "")


def test_a_mask_over_what_the_model_rules_out_is_the_formats() -> None:
    """A row that was finite, and has nothing left behind its mask, was asked for what it cannot say."""
    row = logits_of(4)
    row[0, 3] = -math.inf
    (choice,) = sample(row, [Draw(Sampling(), 0, 0, [1], 1, None, ListConstraint(3))])
    assert choice == Choice(NO_TOKEN, flaw=NOTHING_FITS)


def test_a_mask_does_not_heal_a_row_that_is_not_finite() -> None:
    """Numbers that are not finite are a damaged model's, even where the mask hides them."""
    row = logits_of(5)
    row[0, 0] = math.nan
    for allowed in ((3,), ()):
        (choice,) = sample(row, [Draw(Sampling(), 0, 0, [1], 1, None, ListConstraint(*allowed))])
        assert choice == Choice(NO_TOKEN), "the model is to blame, whatever its constraint says"
