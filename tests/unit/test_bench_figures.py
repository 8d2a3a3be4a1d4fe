"""What a bench quotes of a measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.race.child import ContestantFailed
from bench.race.goals import Goal, Side, goals_of, judge
from bench.race.laps import Course, Sample, run
from bench.race.process_memory import Memory
from bench.race.report import Report
from bench.race.section import replace_section
from bench.race.work import Figures, Trace, Work, figures, percentile


def evenly(first_s: float, gap_s: float, tokens: int) -> tuple[float, ...]:
    """The arrivals of an answer whose tokens come at one pace."""
    return tuple(first_s + gap_s * place for place in range(tokens))


def sample(contestant: str, batch: int, lap: int, rate: float, peak: int = 100) -> Sample:
    """A sample that decoded at some rate."""
    return Sample(contestant, batch, lap, Figures(1.0, rate, rate, 0.1, 0.1, 0.1, 0.1), Memory(peak, peak))


def test_the_decode_rate_counts_the_time_in_which_all_sequences_decode() -> None:
    """Neither the prefill of others nor the end of a batch that grows empty is in it."""
    early, late = evenly(1.0, 0.5, 9), evenly(3.0, 0.5, 9)
    # All decode from 3.0 to 5.0: four tokens each.
    assert figures(Trace((early, late))).decode_tokens_per_s == pytest.approx(8 / 2.0)


def test_without_a_time_in_which_all_decode_there_is_no_decode_rate() -> None:
    """An answer that ends before another begins gives no figure, rather than a wrong one."""
    assert math.isnan(figures(Trace((evenly(0.0, 0.1, 5), evenly(9.0, 0.1, 5)))).decode_tokens_per_s)


def test_a_gathered_run_gives_the_decode_rate_alone() -> None:
    """Latency and throughput stay those of the run that nobody held up."""
    trace = Trace((evenly(0.0, 0.1, 5), evenly(9.0, 0.1, 5)))
    gathered = Trace((evenly(1.0, 0.5, 5), evenly(1.0, 0.5, 5)))
    found = figures(trace, gathered)
    assert found.decode_tokens_per_s == pytest.approx(4.0)
    assert found.tokens_per_s == figures(trace).tokens_per_s


def test_the_latency_is_that_of_fifty_tokens() -> None:
    """Longer answers are cut at the fiftieth token, and answers are averaged."""
    found = figures(Trace((evenly(1.0, 0.1, 64), evenly(2.0, 0.1, 64))))
    assert found.latency_s == pytest.approx(1.5 + 4.9)
    assert found.tokens_per_s == pytest.approx(128 / (2.0 + 6.3))


def test_waits_are_told_at_the_middle_and_at_the_slowest_twentieth() -> None:
    """One slow token of twenty is not in the p95, two are."""
    gaps = [1.0] * 19 + [9.0]
    assert (percentile(gaps, 0.5), percentile(gaps, 0.95)) == (1.0, 1.0)
    assert percentile([1.0] * 18 + [9.0] * 2, 0.95) == 9.0


def test_answers_of_another_length_are_no_result() -> None:
    """A contestant that stops early would look fast."""
    work = Work(((1, 2), (3, 4)), 3)
    Trace((evenly(0, 1, 3), evenly(0, 1, 3))).check(work)
    with pytest.raises(ValueError, match=r"came: \[3, 2\]"):
        Trace((evenly(0, 1, 3), evenly(0, 1, 2))).check(work)


def test_contestants_take_turns_and_batches_grow() -> None:
    """Within a lap all run a batch before anyone runs the next; another one begins in every lap."""
    course = Course(((1,),) * 4, 2, {"a": (1, 4), "b": (4,), "c": (1, 4)}, laps=2)
    first = [(0, 1, "a"), (0, 1, "c"), (0, 4, "a"), (0, 4, "b"), (0, 4, "c")]
    second = [(1, 1, "c"), (1, 1, "a"), (1, 4, "b"), (1, 4, "c"), (1, 4, "a")]
    assert list(course.starts()) == first + second


class FakeStarter:
    """A contestant whose tokens come at one pace; it fails at a batch."""

    def __init__(self, fails_at: int = 0) -> None:
        self._fails_at = fails_at
        self.batches: list[int] = []

    def measure(self, work: Work) -> tuple[Figures, Memory]:
        """See `Starter.measure`."""
        self.batches.append(work.batch)
        if work.batch == self._fails_at:
            raise ContestantFailed("weak: it fell")
        return figures(Trace((evenly(0.1, 0.1, work.new_tokens),) * work.batch)), Memory(1, 2)


def test_who_fails_is_left_behind_and_the_others_go_on() -> None:
    """One contestant's end costs its own figures alone."""
    weak, strong = FakeStarter(fails_at=2), FakeStarter()
    course = Course(((1,), (2,)), 4, {"weak": (1, 2), "strong": (1, 2)}, laps=2)
    samples, failed = run({"weak": weak, "strong": strong}, course, lambda *_: None)
    assert weak.batches == [1, 2]
    assert strong.batches == [1, 2, 1, 2]
    assert failed == {"weak": "batch 2, weak: it fell"}
    assert [one.contestant for one in samples].count("weak") == 1


@pytest.mark.parametrize(("limit_s", "laps"), [(0, 1), (3, 1), (4, 2), (100, 5)])
def test_no_lap_begins_that_would_end_too_late(limit_s: float, laps: int) -> None:
    """A lap of two seconds is begun when two seconds are left; the first one always runs."""
    now_s = 0.0

    class SlowStarter(FakeStarter):
        """Takes a second for each batch."""

        def measure(self, work: Work) -> tuple[Figures, Memory]:
            """See `Starter.measure`."""
            nonlocal now_s
            now_s += 1.0
            return super().measure(work)

    course = Course(((1,), (2,)), 4, {"slow": (1, 2)}, laps=5)
    samples, _ = run({"slow": SlowStarter()}, course, lambda *_: None, limit_s=limit_s, clock=lambda: now_s)
    assert len(samples) == 2 * laps


def test_a_ratio_is_the_median_of_the_ratios_of_the_laps() -> None:
    """A lap in which the machine is slow is slow for both sides, and changes no ratio."""
    rates = ((20.0, 10.0), (2.0, 1.0), (90.0, 30.0))
    samples = [
        one
        for lap, (own, peer) in enumerate(rates)
        for one in (sample("int8", 1, lap, own), sample("peer", 1, lap, peer))
    ]
    goal = Goal("decode tokens/s", Side("int8", 1), Side("peer", 1), bound=2.5)
    found = judge(goal, samples)
    assert (found.ratio, found.met) == (2.0, False)


def test_what_was_not_measured_is_not_met() -> None:
    """An absent side, or one without a figure, gives no ratio."""
    samples = [sample("int8", 1, 0, 10.0), sample("peer", 1, 0, math.nan)]
    for under in (Side("peer", 1), Side("nobody", 1)):
        found = judge(Goal("decode tokens/s", Side("int8", 1), under, bound=1.0), samples)
        assert (found.ratio, found.met) == (None, False)


def test_memory_is_that_of_the_first_lap() -> None:
    """Later laps begin with what larger batches left behind."""
    samples = [sample("int8", 1, 0, 1, 100), sample("int8", 8, 0, 1, 110), sample("int8", 1, 1, 1, 500)]
    goal = next(goal for goal in goals_of("int8", [1, 8]) if goal.figure == "peak memory")
    found = judge(goal, samples)
    assert found.ratio == pytest.approx(1.1)
    assert found.met


def test_the_report_shows_medians_and_names_what_is_absent() -> None:
    """Markdown for people, JSON for programs, from the same figures; NaN never gets into JSON."""
    samples = [sample("int8", 8, lap, rate) for lap, rate in enumerate((10.0, 30.0, math.nan))]
    findings = [judge(goal, samples) for goal in goals_of("int8", [8])]
    report = Report("bench", "A machine.", "Work.", samples, findings, {"int8": 1.0}, ["Absent: llama.cpp."])
    text, plain = report.markdown(), report.json()
    assert "| int8 | 8 | 0 | 0 | 1.00 | 20.0 | 20.0 |" in text
    assert "not measured | at least 2.5" in text
    assert text.endswith("Absent: llama.cpp.")
    assert plain["medians"][0]["decode_tokens_per_s"] == 20.0
    assert plain["samples"][2]["decode_tokens_per_s"] is None


@pytest.fixture
def document(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a document."""

    def write(text: str) -> Path:
        path = tmp_path / "document.md"
        path.write_text(text)
        return path

    return write


def test_a_section_is_replaced_between_its_markers(document: Callable[[str], Path]) -> None:
    """What stands around it stays as it is, and writing twice changes nothing."""
    path = document("# Head\n\n<!-- x: begin -->\nold\n<!-- x: end -->\n\n## Tail\n")
    for _ in range(2):
        replace_section(path, "x", "new\n")
        assert path.read_text() == ("# Head\n\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\n\n## Tail\n")


def test_a_document_without_the_markers_gets_the_section_at_its_end(
    document: Callable[[str], Path],
) -> None:
    """Nothing that was written by hand is ever lost."""
    path = document("# Head\n")
    replace_section(path, "x", "new")
    assert path.read_text() == "# Head\n\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\n"
