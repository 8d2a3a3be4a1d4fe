"""The sampler: filters keep what they should, noise decides the rest, and rows do not see each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from services.worker.adapters.torch_sampler import SHORTLIST_TOKENS, sample
from services.worker.core.batch import Draw
from services.worker.core.scheduler import NO_TOKEN
from services.worker.core.sequence import Sampling

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]))


def tokens_of(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The tokens that are chosen."""
    return [choice.token_id for choice in sample(logits, draws)]


def counts(sampling: Sampling, rows: int = 4_000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    """How often each token is drawn at many positions."""
    draws = [Draw(sampling, 0, index) for index in range(rows)]
    return Counter(tokens_of(logits.expand(rows, -1), draws))


def test_greedy_takes_the_most_likely() -> None:
    """Without temperature the noise has no say."""
    assert set(counts(Sampling(seed=3))) == {1}


def test_frequencies_are_the_probabilities() -> None:
    """At temperature 1 tokens come as often as their probability says."""
    found = counts(Sampling(temperature=1.0, seed=3))
    for token, wanted in enumerate((0.05, 0.4, 0.25, 0.2, 0.1)):
        assert found[token] / 4_000 == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=2), {1, 2}),
        (Sampling(1.0, top_k=1), {1}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.6), {1, 2}),
        (Sampling(1.0, top_p=0.86), {1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.01), {1}),
        (Sampling(1.0, top_p=2.0**-126), {1}),
        (Sampling(1.0, min_p=0.45), {1, 2, 3}),
        (Sampling(1.0, top_k=3, top_p=0.7), {1, 2}),
        (Sampling(0.01), {1}),
        (Sampling(1e-4), {1}),
        (Sampling(2e-38), {1}),
    ],
)
def test_filters_keep_what_they_name(sampling: Sampling, kept: set[int]) -> None:
    """Exactly the tokens that pass the filters are ever drawn."""
    assert set(counts(sampling)) == kept


def test_top_p_is_exact_over_a_flat_vocabulary() -> None:
    """Where the shortlist does not hold the mass, the whole vocabulary is ranked."""
    vocabulary = 4 * SHORTLIST_TOKENS
    logits = torch.linspace(0.0, 1e-3, vocabulary).double()
    found = counts(Sampling(1.0, top_p=0.5, seed=1), rows=300, logits=logits)
    assert min(found) >= vocabulary // 2 - 1
    assert min(found) < vocabulary - SHORTLIST_TOKENS


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """The same row draws the same token alone and beside rows with every other filter."""
    torch.manual_seed(0)
    logits = torch.randn(5, 3_000)
    samplings = [
        Sampling(0.8, seed=1),
        Sampling(),
        Sampling(1.3, top_k=7, seed=2),
        Sampling(1.0, top_p=0.999, seed=3),
        Sampling(0.7, min_p=0.1, seed=4),
    ]
    draws = [Draw(sampling, 0, 5) for sampling in samplings]
    together = tokens_of(logits, draws)
    assert together == [tokens_of(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]


def test_a_row_that_is_not_finite_has_no_token() -> None:
    """NaN and infinity are told apart from tokens, greedy or drawn, and harm no other row."""
    bad = torch.full((5,), float("nan"))
    infinite = LOGITS.clone()
    infinite[2] = float("inf")
    drawn = Sampling(1.0, seed=1)
    draws = [Draw(one, 0, 0) for one in (Sampling(), drawn, drawn, Sampling())]
    tokens = tokens_of(torch.stack([bad, bad, infinite, LOGITS]), draws)
    assert tokens == [NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]


def test_a_row_without_mass_has_no_token() -> None:
    """A quotient that overflows leaves nothing to draw from, and no id outside the vocabulary."""
    huge = LOGITS.clone()
    huge[2] = 3e38
    drawn = Sampling(0.1, seed=1)
    tokens = tokens_of(torch.stack([huge, LOGITS]), [Draw(drawn, 0, 0), Draw(drawn, 0, 0)])
    assert tokens[0] == NO_TOKEN
    assert 0 <= tokens[1] < len(LOGITS)
