"""The sampler. Owns: how logits become tokens, for all rows of a step at once.

Every row's result depends on that row's logits and draw alone. Rows that ask for it are adjusted first, in
the order of transformers: bias, penalties, the mask of their constraint (`torch_adjustment`). Filters are
thresholds on probability, in the order of transformers too: temperature, top-k, top-p, min-p. The token is
the inverse of the cumulative distribution, in the order of ids, at the draw's own noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.adapters.torch_adjustment import adjusted, score
from services.worker.core.batch import Choice, Draw
from services.worker.core.noise import uniform
from services.worker.core.scheduler import NO_TOKEN

# The likeliest tokens nearly always hold the mass that top-p asks for; sorting them all takes ten times
# as long.
SHORTLIST_TOKENS = 1_024

# Where a constraint broke without a word, or allows only what the vocabulary or the model does not have.
NOTHING_FITS = "format: no token of this model fits it here."


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Chooses a token for each row of `logits`, `[rows, vocabulary]`; NO_TOKEN where a row is not finite.

    Also where a row's constraint leaves no token of one that was finite; the choice says then that it is so.

    `logits` stay as they are: rows that are adjusted are copied, and no others.
    """
    best, greedy = logits.max(dim=-1)
    sound = best.isfinite()
    changed = {row: adjusted(logits[row], draw) for row, draw in enumerate(draws) if draw.adjusts}
    fits = sound.clone() if changed else sound
    for row, (values, _) in changed.items():
        highest, greedy[row] = values.max(dim=-1)
        # A row that was not finite stays without a token, whatever its mask hides.
        fits[row] &= highest.isfinite()
    tokens = torch.where(fits, greedy, NO_TOKEN)
    drawn = [row for row, draw in enumerate(draws) if not draw.sampling.greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        # Indexing with a tensor copies.
        picked = logits[rows].float()
        for place, row in enumerate(drawn):
            if row in changed:
                picked[place] = changed[row][0]
        chosen = _draw(picked, [draws[row] for row in drawn])
        tokens[rows] = torch.where(fits[rows], chosen, NO_TOKEN)
    choices = [_choice(logits, draws, row, token) for row, token in enumerate(tokens.tolist())]
    for row, (_, flaw) in changed.items():
        if choices[row].token_id == NO_TOKEN and draws[row].constraint is not None and sound[row]:
            choices[row] = Choice(NO_TOKEN, flaw=flaw or NOTHING_FITS)
    return choices


def _choice(logits: torch.Tensor, draws: Sequence[Draw], row: int, token: int) -> Choice:
    alternatives = draws[row].logprobs
    if alternatives is None or token == NO_TOKEN:
        return Choice(token)
    return Choice(token, score(logits[row], token, alternatives))


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The token of each row; NO_TOKEN where what the filters keep has no mass to draw from."""
    column = _column([draw.sampling.temperature for draw in draws], logits)
    # Double precision: the smallest tail must not be lost in the sum over the vocabulary.
    kept = torch.softmax(logits / column, dim=-1, dtype=torch.float64)
    kept = _keep_top_k(kept, [draw.sampling.top_k for draw in draws])
    kept = _keep_top_p(kept, [draw.sampling.top_p for draw in draws])
    kept = _keep_min_p(kept, [draw.sampling.min_p for draw in draws])
    cumulative = kept.cumsum(dim=-1)
    noise = _column([uniform(draw.sampling.seed, draw.sequence, draw.index) for draw in draws], kept)
    total = cumulative[:, -1:]
    # Rounding may lift the product to the total itself, behind the last token.
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target, right=True)
    # Among numbers that are not, the search would end behind the vocabulary, and the next step with it.
    return torch.where(total.isfinite() & (total > 0), chosen, NO_TOKEN).squeeze(1)


def _keep_top_k(kept: torch.Tensor, limits: Sequence[int]) -> torch.Tensor:
    vocabulary = kept.shape[-1]
    wanted = [limit if 0 < limit < vocabulary else vocabulary for limit in limits]
    if min(wanted) == vocabulary:
        return kept
    largest = max(limit for limit in wanted if limit < vocabulary)
    ranked = kept.topk(largest, dim=-1).values
    rank = torch.tensor([min(limit, largest) - 1 for limit in wanted], device=kept.device)
    threshold = ranked.gather(1, rank.unsqueeze(1))
    unlimited = torch.tensor([limit == vocabulary for limit in wanted], device=kept.device).unsqueeze(1)
    return torch.where(unlimited | (kept >= threshold), kept, 0.0)


def _keep_top_p(kept: torch.Tensor, masses: Sequence[float]) -> torch.Tensor:
    if min(masses) >= 1:
        return kept
    mass = _column(masses, kept)
    target = mass * kept.sum(dim=-1, keepdim=True)
    ranked = kept.topk(min(SHORTLIST_TOKENS, kept.shape[-1]), dim=-1).values
    cumulative = ranked.cumsum(dim=-1)
    short = (cumulative[:, -1:] < target) & (mass < 1)
    if bool(short.any()):
        ranked = kept.sort(dim=-1, descending=True).values
        cumulative = ranked.cumsum(dim=-1)
    # The first token that reaches the mass is kept, and all that are as likely.
    rank = torch.searchsorted(cumulative, target).clamp(max=ranked.shape[-1] - 1)
    threshold = ranked.gather(1, rank)
    return torch.where((mass >= 1) | (kept >= threshold), kept, 0.0)


def _keep_min_p(kept: torch.Tensor, ratios: Sequence[float]) -> torch.Tensor:
    if max(ratios) <= 0:
        return kept
    threshold = _column(ratios, kept) * kept.max(dim=-1, keepdim=True).values
    return torch.where(kept >= threshold, kept, 0.0)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
