"""What rounds of a flood say together."""

from __future__ import annotations

from typing import Any

import pytest

from bench import overload
from bench.overload import Round, line_of_summary, summary_of


def told(tokens_per_s: float, **what: Any) -> dict[str, Any]:
    """A step, as the bench tells of it."""
    return {
        "goodput_tokens_per_s": tokens_per_s, "rate": None, "shed_rate": 0.0, "missed_deadlines": 0,
        "refusal_ms": {"p50": None, "p95": None}, "refusals_with_retry_after": None,
        "requests": {"failed": 0},
    } | what  # fmt: skip


def flooded(tokens_per_s: float, p50: float, p95: float, **what: Any) -> dict[str, Any]:
    """A step of arrivals of which nine in ten were refused."""
    refusals = {"refusal_ms": {"p50": p50, "p95": p95}, "refusals_with_retry_after": 1.0}
    return told(tokens_per_s, rate=150.0, shed_rate=0.9, **refusals) | what


def test_a_flood_is_compared_with_what_was_before_and_after_it() -> None:
    """By the mean of the two, as the machine drifts; the medians of all rounds are told."""
    one = Round(told(100.0), flooded(90.0, 5.0, 20.0), told(80.0))
    two = Round(told(200.0), flooded(100.0, 7.0, 30.0, missed_deadlines=2), told(200.0))
    three = Round(told(100.0), flooded(60.0, 9.0, 90.0, refusals_with_retry_after=0.5), told(100.0))
    assert (one.kept, one.recovered) == (1.0, 0.8)
    summary = summary_of([one, two, three])
    assert summary == {
        "arrivals_per_s": 150.0, "shed_rate": 0.9, "refusal_ms_p50": 7.0, "refusal_ms_p95": 30.0,
        "refusals_with_retry_after": 0.5, "missed_deadlines": 2, "failed": 0, "goodput_kept": 0.6,
        "goodput_after": 1.0,
    }  # fmt: skip
    assert "90% refused after 7 ms (30 ms" in line_of_summary(summary)


def test_without_refusals_there_are_no_latencies() -> None:
    """A mesh that answers all of them, and one that answers nothing, are told of as well."""
    summary = summary_of([Round(told(0.0), told(0.0, rate=10.0), told(0.0))])
    assert summary["refusal_ms_p95"] is None
    assert (summary["goodput_kept"], summary["goodput_after"]) == (0.0, 0.0)
    assert "nobody refused" in line_of_summary(summary)


def test_a_flood_is_more_than_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says so."""
    with pytest.raises(SystemExit):
        overload.main(["--factor", "0"])
    assert "--factor" in capsys.readouterr().err
