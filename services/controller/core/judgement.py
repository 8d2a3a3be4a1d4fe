"""The judgement of a new revision. Owns: when counts say that it is worse than the old one may be.

Pure over counts. Must not know: who counted, when a rollout begins or what follows from a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from services.common.ttft_buckets import BOUNDS_S

# Slower by less than this is nobody's trouble, however many times as long it is.
TTFT_SLACK_S = 0.1
# Right after a switch caches are cold, and the old revision's last answers share the workers' time.
TTFT_AFTER_S = 10.0
# Which percentiles of the first tokens are compared, and how many of them each takes to mean something.
_PERCENTILES = ((50, 50), (95, 100))
# With so many first tokens of the old revision nothing needs more of them.
FIRST_TOKENS_ENOUGH = max(least for _, least in _PERCENTILES)


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the attempts at a revision.

    Attributes:
        finished: Attempts whose text came to its end.
        failed: Attempts that failed by the worker's doing.
        ttft: Attempts by the bucket of `common.ttft_buckets`; trailing ones may lack.
    """

    finished: int = 0
    failed: int = 0
    ttft: tuple[int, ...] = ()

    @property
    def ended(self) -> int:
        """All that came to an end that says something."""
        return self.finished + self.failed

    @property
    def failed_share(self) -> float:
        """The share that failed, 0 to 1; 0 where nothing ended."""
        return self.failed / self.ended if self.ended else 0.0

    @property
    def first_tokens(self) -> int:
        """How many first tokens came."""
        return sum(self.ttft)

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        both = zip_longest(self.ttft, other.ttft, fillvalue=0)
        ttft = tuple(here + there for here, there in both)
        return Tally(self.finished + other.finished, self.failed + other.failed, ttft)

    def since(self, earlier: Tally) -> Tally:
        """What was counted after `earlier`: all, where the count has begun anew."""
        pairs = tuple(zip_longest(self.ttft, earlier.ttft, fillvalue=0))
        finished, failed = self.finished - earlier.finished, self.failed - earlier.failed
        if finished < 0 or failed < 0 or any(now < before for now, before in pairs):
            return self
        return Tally(finished, failed, tuple(now - before for now, before in pairs))

    def ttft_s(self, percentile: int) -> float:
        """A time that so many per cent of the first tokens did not exceed; there must be one at least."""
        wanted, seen = self.first_tokens * percentile / 100, 0
        for bound_s, count in zip(BOUNDS_S, self.ttft, strict=False):
            seen += count
            if seen >= wanted:
                return bound_s
        return BOUNDS_S[-1]


class Finding(StrEnum):
    """What the counts say."""

    GOOD = "good"
    BAD = "bad"
    OPEN = "open"  # too few to say either


@dataclass(frozen=True, slots=True)
class Verdict:
    """A finding, and its reason in a sentence for people."""

    finding: Finding
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How much worse a new revision may be.

    Attributes:
        failed_percent_max: How many of its attempts may fail beyond the old one's share; 100: any.
        ttft_ratio_max: How many times as long as before first tokens may take; 0: any.
        failures_min: Fewer failures than this are chance,
        hopeless_min: but for so many, and nothing else.
        ended_min: Fewer ends than this do not say that a revision is good, nor what was usual before.
    """

    failed_percent_max: int
    ttft_ratio_max: int
    # Two workers reach it before both end themselves over steps that keep failing. While they start again
    # nothing is counted, and a revision that fails then must not wait for more.
    failures_min: int = 5
    hopeless_min: int = 3
    ended_min: int = 10


def judge(new: Tally, old: Tally, rules: Rules, judged_s: float) -> Verdict:
    """Compares a new revision with the one that it replaces.

    Args:
        new: What became of the new revision's attempts since it is judged.
        old: The same of the old one, in the same time or before.
        rules: How much worse the new one may be.
        judged_s: For how long it has been judged.
    """
    for flaw in _flaws(new, old, rules, judged_s):
        return Verdict(Finding.BAD, flaw)
    if new.ended < rules.ended_min:
        return Verdict(Finding.OPEN, f"{_ends(new)}, {new.failed} failed: too few to judge it by.")
    return Verdict(Finding.GOOD, f"{_ends(new)}, {new.failed} failed{_first_tokens(new)}.")


def _flaws(new: Tally, old: Tally, rules: Rules, judged_s: float) -> Iterator[str]:
    usual = old.failed_share if old.ended >= rules.ended_min else 0.0
    enough = new.failed >= rules.failures_min
    hopeless = new.failed >= rules.hopeless_min and not new.finished
    if (enough or hopeless) and new.failed_share > usual + rules.failed_percent_max / 100:
        before = f", of the old one's {usual:.1%}" if usual else ""
        yield f"{new.failed} of {_ends(new)} failed{before}."
    if judged_s < TTFT_AFTER_S or not rules.ttft_ratio_max:
        return
    for percentile, least in _PERCENTILES:
        if min(new.first_tokens, old.first_tokens) < least:
            continue
        new_s, old_s = new.ttft_s(percentile), old.ttft_s(percentile)
        if new_s > old_s * rules.ttft_ratio_max and new_s > old_s + TTFT_SLACK_S:
            yield f"First tokens take {new_s:.2g} s (p{percentile}), the old one's took {old_s:.2g} s."


def _ends(tally: Tally) -> str:
    return "1 attempt" if tally.ended == 1 else f"{tally.ended} attempts"


def _first_tokens(tally: Tally) -> str:
    if not tally.first_tokens:
        return ""
    return f", first tokens within {tally.ttft_s(50):.2g} s (p50) and {tally.ttft_s(95):.2g} s (p95)"
