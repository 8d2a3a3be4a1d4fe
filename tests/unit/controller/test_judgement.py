"""The judgement: counts of a new revision beside those of the old one, and what they say."""

from __future__ import annotations

import pytest

from services.common.ttft_buckets import BOUNDS_S, BUCKETS, bucket_of
from services.controller.core.judgement import Finding, Rules, Tally, judge

RULES = Rules(failed_percent_max=5, ttft_ratio_max=3)
LONG_S = 60.0


def took(seconds: float, times: int, *, slow_s: float = 0.0, slow: int = 0) -> Tally:
    """Answers whose first tokens took `seconds`, and some that took `slow_s`."""
    counts = [0] * BUCKETS
    counts[bucket_of(seconds)] += times
    counts[bucket_of(slow_s)] += slow
    return Tally(times + slow, 0, tuple(counts))


@pytest.mark.parametrize(
    ("new", "old", "finding"),
    [
        (Tally(), Tally(), Finding.OPEN),
        (Tally(finished=9), Tally(), Finding.OPEN),
        (Tally(finished=10), Tally(), Finding.GOOD),
        # Fewer than five failures are chance, whatever their share.
        (Tally(finished=6, failed=4), Tally(), Finding.GOOD),
        (Tally(finished=5, failed=4), Tally(), Finding.OPEN),
        # Five are not, however few have ended: workers that end themselves over it let no more be counted.
        (Tally(finished=1, failed=5), Tally(), Finding.BAD),
        (Tally(finished=5, failed=5), Tally(), Finding.BAD),
        # Where nothing at all comes of it, three are enough, unless the old one does no better.
        (Tally(failed=2), Tally(), Finding.OPEN),
        (Tally(failed=3), Tally(), Finding.BAD),
        (Tally(finished=1, failed=3), Tally(), Finding.OPEN),
        (Tally(failed=3), Tally(failed=30), Finding.OPEN),
        # A twentieth is what may fail, and no more.
        (Tally(finished=95, failed=5), Tally(), Finding.GOOD),
        (Tally(finished=94, failed=6), Tally(), Finding.BAD),
        # What fails with the old revision as well is not the new one's doing.
        (Tally(finished=90, failed=10), Tally(finished=93, failed=7), Finding.GOOD),
        (Tally(finished=80, failed=20), Tally(finished=93, failed=7), Finding.BAD),
        # Too few ends of the old one say nothing about what is usual.
        (Tally(finished=80, failed=20), Tally(finished=1, failed=1), Finding.BAD),
    ],
)
def test_failures(new: Tally, old: Tally, finding: Finding) -> None:
    """Shares decide, and only where there is enough to count."""
    assert judge(new, old, RULES, LONG_S).finding is finding


@pytest.mark.parametrize(
    ("new", "old", "finding"),
    [
        (took(0.2, 50), took(0.1, 50), Finding.GOOD),
        (took(0.5, 50), took(0.1, 50), Finding.BAD),
        # One less on either side, and nothing is compared.
        (took(0.5, 49), took(0.1, 50), Finding.GOOD),
        (took(0.5, 50), took(0.1, 49), Finding.GOOD),
        # Ten times as long, and yet nobody notices.
        (took(0.05, 50), took(0.005, 50), Finding.GOOD),
        # Half of them are as fast as ever; the slow tail is what is bad.
        (took(0.1, 90, slow_s=2.0, slow=10), took(0.1, 100), Finding.BAD),
        (took(0.1, 96, slow_s=2.0, slow=4), took(0.1, 100), Finding.GOOD),
        (took(0.1, 80, slow_s=2.0, slow=10), took(0.1, 100), Finding.GOOD),
    ],
)
def test_first_tokens(new: Tally, old: Tally, finding: Finding) -> None:
    """Median and tail are compared, each with its own least number of samples."""
    assert judge(new, old, RULES, LONG_S).finding is finding


def test_first_tokens_right_after_the_switch_are_not_judged() -> None:
    """Caches are cold then, and the old revision's last answers share the machine; failures count at once."""
    slow, fast = took(5.0, 100), took(0.1, 100)
    assert judge(slow, fast, RULES, 9.9).finding is Finding.GOOD
    assert judge(slow, fast, RULES, 10.0).finding is Finding.BAD
    assert judge(Tally(failed=10), Tally(), RULES, 0.0).finding is Finding.BAD


def test_rules_can_be_turned_off() -> None:
    """100 % lets all fail, a ratio of 0 all be slow."""
    rules = Rules(failed_percent_max=100, ttft_ratio_max=0)
    assert judge(Tally(failed=100), Tally(), rules, LONG_S).finding is Finding.GOOD
    assert judge(took(5.0, 100), took(0.1, 100), rules, LONG_S).finding is Finding.GOOD


def test_reasons_are_sentences_with_the_numbers() -> None:
    """An operator reads in them why a rollout ended."""
    bad = judge(Tally(finished=8, failed=12), Tally(finished=99, failed=1), RULES, LONG_S)
    assert bad.reason == "12 of 20 attempts failed, of the old one's 1.0%."
    slow = judge(took(0.5, 50), took(0.1, 50), RULES, LONG_S)
    assert slow.reason == "First tokens take 0.52 s (p50), the old one's took 0.11 s."
    single = judge(Tally(finished=1), Tally(), RULES, LONG_S)
    assert single.reason == "1 attempt, 0 failed: too few to judge it by."
    good = judge(took(0.1, 50), Tally(), RULES, LONG_S)
    assert good.reason == "50 attempts, 0 failed, first tokens within 0.11 s (p50) and 0.11 s (p95)."


def test_what_was_counted_since() -> None:
    """The difference of two looks; a count that has shrunk began anew, and counts as a whole."""
    before, now = Tally(5, 1, (1, 2)), Tally(7, 1, (1, 2, 4))
    assert now.since(before) == Tally(2, 0, (0, 0, 4))
    assert before.since(now) == before
    assert before.plus(now) == Tally(12, 2, (2, 4, 4))


def test_buckets_hold_every_time() -> None:
    """Each bucket ends at its bound; what is longer than all falls into the last one."""
    assert [bucket_of(bound) for bound in BOUNDS_S] == list(range(BUCKETS - 1))
    assert (bucket_of(0.0), bucket_of(1e6)) == (0, BUCKETS - 1)
    assert Tally(ttft=(0,) * (BUCKETS - 1) + (1,)).ttft_s(50) == BOUNDS_S[-1]
