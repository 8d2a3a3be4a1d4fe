"""Adjustments of one row. Owns: what bias, penalties and constraints do to logits, and how tokens are scored.

Nothing is kept between steps: each adjustment is computed from the row's own history. So a sequence that is
continued elsewhere, or recomputed, meets the same numbers, and a neighbour never sees them.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from services.worker.core.batch import Draw
from services.worker.core.format import Constraint, ConstraintBroken
from services.worker.core.sequence import Sampling, TokenScore


def adjusted(logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, str]:
    """A copy of one row, `[vocabulary]`, in single precision, as `draw` wants it.

    Where the draw's constraint allows no token, every value is minus infinity. If that is because it broke,
    the second value says why.
    """
    values = logits.to(torch.float32, copy=True)
    _add_bias(values, draw.sampling)
    values = _penalize_repetition(values, draw)
    _penalize_output(values, draw)
    flaw = "" if draw.constraint is None else _mask(values, draw, draw.constraint)
    return values, flaw


def score(logits: torch.Tensor, token: int, alternatives: int) -> TokenScore:
    """The score of `token` in one row of the model's own logits, with so many of the likeliest tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
    ranked = zip(ids.tolist(), values.tolist(), strict=True)
    # A token that the model rules out has no number that JSON can spell.
    likeliest = tuple((token_id, value) for token_id, value in ranked if math.isfinite(value))
    return TokenScore(float(logprobs[token]), likeliest)


def _add_bias(values: torch.Tensor, sampling: Sampling) -> None:
    # The library's own processor for it validates and builds a row of the vocabulary for each instance.
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        values[torch.tensor(ids, device=values.device)] += torch.tensor(biases, device=values.device)


def _penalize_repetition(values: torch.Tensor, draw: Draw) -> torch.Tensor:
    penalty = draw.sampling.repetition_penalty
    if penalty == 1.0 or not draw.history:
        return values
    seen = torch.tensor([draw.history], device=values.device)
    processed: torch.Tensor = RepetitionPenaltyLogitsProcessor(penalty)(seen, values.unsqueeze(0))
    return processed.squeeze(0)


def _penalize_output(values: torch.Tensor, draw: Draw) -> None:
    sampling, emitted = draw.sampling, draw.emitted_ids
    if not emitted or sampling.presence_penalty == sampling.frequency_penalty == 0.0:
        return
    occurrences = Counter(emitted)
    ids = torch.tensor(list(occurrences), device=values.device)
    counts = torch.tensor(list(occurrences.values()), device=values.device)
    values[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _mask(values: torch.Tensor, draw: Draw, constraint: Constraint) -> str:
    try:
        allowed = constraint.allowed(draw.emitted_ids)
    except ConstraintBroken as broken:
        values.fill_(-math.inf)
        return str(broken)
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little", count=len(values))
    values.masked_fill_(torch.from_numpy(bits).to(values.device) == 0, -math.inf)
    return ""
