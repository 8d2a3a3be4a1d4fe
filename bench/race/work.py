"""Work and what came of it. Owns: the one definition of every figure, for every contestant alike. Pure.

All figures come from one thing: when each token of each answer arrived, counted from the moment at which
the work was handed over. How a contestant batches, and in what language it is written, makes no difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

# The length of the answer whose latency is quoted: it is read off the same run.
ANSWER_TOKENS = 50


@dataclass(frozen=True, slots=True)
class Work:
    """One batch: all prompts are handed over at once, and answered greedily with so many tokens each.

    Attributes:
        prompts: The token ids of each prompt.
        new_tokens: Tokens of each answer; no token ends it earlier.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int

    @property
    def batch(self) -> int:
        """Sequences at once."""
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class Trace:
    """When tokens arrived, in seconds from the start: one tuple for each prompt, in the prompts' order."""

    arrivals_s: tuple[tuple[float, ...], ...]

    def check(self, work: Work) -> None:
        """Raises ValueError unless every prompt was answered with exactly the tokens that were asked for."""
        lengths = [len(answer) for answer in self.arrivals_s]
        if lengths != [work.new_tokens] * work.batch:
            raise ValueError(f"{work.batch} answers of {work.new_tokens} tokens were due; came: {lengths}.")


@dataclass(frozen=True, slots=True)
class Figures:
    """What is quoted of one trace.

    Attributes:
        latency_s: Mean time to the 50th token of an answer, or to its last one if it is shorter.
        tokens_per_s: All tokens over the whole time, prefill included.
        decode_tokens_per_s: Tokens of the time in which every sequence decodes; NaN if there is none.
        ttft_p50_s: Median time to the first token of an answer.
        ttft_p95_s: The same, at the slowest twentieth.
        itl_p50_s: Median time between two tokens of an answer.
        itl_p95_s: The same, at the slowest twentieth.
    """

    latency_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    itl_p50_s: float
    itl_p95_s: float


def figures(trace: Trace, gathered: Trace | None = None) -> Figures:
    """What is quoted of a trace; its decode rate is that of the gathered one, where there was one."""
    answers = trace.arrivals_s
    firsts = [answer[0] for answer in answers]
    gaps = [later - earlier for answer in answers for earlier, later in itertools.pairwise(answer)]
    latencies = [answer[min(len(answer), ANSWER_TOKENS) - 1] for answer in answers]
    tokens = sum(map(len, answers))
    return Figures(
        latency_s=sum(latencies) / len(latencies),
        tokens_per_s=tokens / max(answer[-1] for answer in answers),
        decode_tokens_per_s=decode_rate(gathered or trace),
        ttft_p50_s=percentile(firsts, 0.50),
        ttft_p95_s=percentile(firsts, 0.95),
        itl_p50_s=percentile(gaps, 0.50),
        itl_p95_s=percentile(gaps, 0.95),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def decode_rate(trace: Trace) -> float:
    """Tokens per second of the time in which every sequence decodes; NaN if there is none."""
    answers = trace.arrivals_s
    # From the last sequence's first token to the first sequence's last one: neither prefill nor a batch
    # that grows empty is counted, whoever the contestant is.
    begin_s = max(answer[0] for answer in answers)
    end_s = min(answer[-1] for answer in answers)
    tokens = sum(begin_s < arrival <= end_s for answer in answers for arrival in answer)
    return tokens / (end_s - begin_s) if tokens else math.nan
