"""The figures of one step of load. Owns: how they are computed from traces; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.load_trace import Fate, Trace


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, the 95th percentile and how many there were; None where there were none."""

    p50: float | None
    p95: float | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a step measured: tokens and starts of the window, and the fates of attempts that began in it.

    Attributes:
        goodput_tokens_per_s: Tokens that came, without those of answers that failed or missed a deadline.
        ttft_ms: From a client's first asking, refused attempts included, to a first token in the window.
        itl_ms: Between tokens; a message of several counts as so many, evenly spaced.
        answers: Answers that ended in the window.
        requests: Attempts that began, by fate.
        shed_rate: The share of ended and running attempts that was refused.
        refusal_ms: From an attempt to its refusal.
        refusals_with_retry_after: The share of refusals that told when to come back; None: no refusals.
        missed_deadlines: Attempts whose deadline passed after they had been admitted.
        wait_error_s: The absolute error of the first estimated wait, of requests that started in the window.
        tenant_tokens: Good tokens by tenant.
        jain: Jain's index over tokens divided by weight; 1: exactly fair.
    """

    goodput_tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    answers: int
    requests: Mapping[str, int]
    shed_rate: float
    refusal_ms: Spread
    refusals_with_retry_after: float | None
    missed_deadlines: int
    wait_error_s: Spread
    tenant_tokens: Mapping[str, int] = field(default_factory=dict)
    jain: float = 1.0


def figures(traces: Sequence[Trace], weights: Mapping[str, float], window_s: tuple[float, float]) -> Figures:
    """The figures of a window `(from, to)` of the traces' clock."""
    began_s, ended_s = window_s
    mine = [trace for trace in traces if began_s <= trace.began_s < ended_s]
    refused = [trace for trace in mine if trace.fate is Fate.REFUSED]
    tokens = {
        name: sum(good_tokens(trace, window_s) for trace in traces if trace.tenant == name)
        for name in weights
    }
    told = [trace.retry_after_s is not None for trace in refused]
    return Figures(
        goodput_tokens_per_s=round(sum(tokens.values()) / (ended_s - began_s), 1),
        ttft_ms=spread_ms(ttft_s for trace in traces for ttft_s in ttfts_s(trace, window_s)),
        itl_ms=spread_ms(gap_s for trace in traces for gap_s in gaps_s(trace, window_s)),
        answers=sum(_answered(trace, window_s) for trace in traces),
        requests={fate.value: sum(trace.fate is fate for trace in mine) for fate in Fate},
        shed_rate=round(len(refused) / len(mine), 4) if mine else 0.0,
        refusal_ms=spread_ms((trace.ended_s or 0.0) - trace.began_s for trace in refused),
        refusals_with_retry_after=round(sum(told) / len(told), 4) if told else None,
        missed_deadlines=sum(trace.fate is Fate.MISSED for trace in mine),
        wait_error_s=spread(wait_errors_s(traces, window_s)),
        tenant_tokens=tokens,
        jain=round(jain([tokens[name] / weights[name] for name in weights]), 4),
    )


def good_tokens(trace: Trace, window_s: tuple[float, float]) -> int:
    """Tokens that came in the window, none of an answer that failed or came too late."""
    if trace.fate in {Fate.FAILED, Fate.MISSED}:
        return 0
    return sum(count for at_s, count in trace.arrivals if window_s[0] <= at_s < window_s[1])


def _answered(trace: Trace, window_s: tuple[float, float]) -> bool:
    return trace.fate is Fate.FINISHED and window_s[0] <= (trace.ended_s or 0.0) < window_s[1]


def ttfts_s(trace: Trace, window_s: tuple[float, float]) -> list[float]:
    """How long the first token took, if it came in the window."""
    return [at_s - trace.wished_s for at_s, _ in trace.arrivals[:1] if window_s[0] <= at_s < window_s[1]]


def gaps_s(trace: Trace, window_s: tuple[float, float]) -> list[float]:
    """The times between one token and the next, of those that came in the window."""
    found: list[float] = []
    for (before_s, _), (at_s, count) in pairwise(trace.arrivals):
        if window_s[0] <= at_s < window_s[1]:
            found += [(at_s - before_s) / count] * count
    return found


def wait_errors_s(traces: Iterable[Trace], window_s: tuple[float, float]) -> list[float]:
    """How far the first estimated wait was from the real one."""
    return [
        abs(trace.started_s - trace.told_wait[0] - trace.told_wait[1])
        for trace in traces
        if trace.told_wait is not None
        and trace.started_s is not None
        and window_s[0] <= trace.started_s < window_s[1]
    ]


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 for equal shares, 1/n when one has everything; 1 of nothing."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def spread_ms(durations_s: Iterable[float]) -> Spread:
    """The spread of durations in seconds, in milliseconds."""
    return spread([duration_s * 1_000 for duration_s in durations_s])


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by nearest rank, so that each is a value that occurred."""
    ranked = sorted(values)
    return Spread(percentile(ranked, 0.50), percentile(ranked, 0.95), len(ranked))


def percentile(ranked: Sequence[float], share: float) -> float | None:
    """The value that `share` of the sorted values do not exceed; None of nothing."""
    if not ranked:
        return None
    return round(ranked[max(0, math.ceil(share * len(ranked)) - 1)], 3)
