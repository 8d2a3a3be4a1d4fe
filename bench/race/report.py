"""The report of a race. Owns: medians over laps, and how they are written as Markdown and JSON. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.race.goals import Finding
from bench.race.laps import Sample
from bench.race.section import table

_HEAD = [
    "contestant",
    "batch",
    "memory, MB",
    "peak, MB",
    "50-token answer, s",
    "tokens/s",
    "decode tokens/s",
    "TTFT p50, ms",
    "TTFT p95, ms",
    "ITL p50, ms",
    "ITL p95, ms",
]


@dataclass(frozen=True, slots=True)
class Report:
    """What a race came to.

    Attributes:
        command: The command that was given.
        machine: Where, in words.
        work: What each contestant did, in words.
        samples: Everything that was measured.
        findings: The ratios.
        load_s: By contestant, how long loading took.
        notes: Who was absent, and why.
    """

    command: str
    machine: str
    work: str
    samples: Sequence[Sample]
    findings: Sequence[Finding]
    load_s: dict[str, float]
    notes: Sequence[str]

    def markdown(self) -> str:
        """As a section of a document."""
        parts = [f"`{self.command}`", self.machine + " " + self.work, table(_HEAD, self._rows())]
        parts.append(table(["ratio (medians over rounds)", "measured", "goal", ""], self._ratios()))
        return "\n\n".join([*parts, *self.notes])

    def json(self) -> dict[str, Any]:
        """Everything, for programs; NaN is null."""
        return {
            "command": self.command,
            "machine": self.machine,
            "work": self.work,
            "load_s": self.load_s,
            "medians": [
                {"contestant": name, "batch": batch, **_plain(self._medians(name, batch))}
                for name, batch in self._pairs()
            ],
            "ratios": [asdict(finding) | {"met": finding.met} for finding in self.findings],
            "samples": [
                {"contestant": one.contestant, "batch": one.batch, "round": one.lap}
                | _plain(asdict(one.figures) | asdict(one.memory))
                for one in self.samples
            ],
            "notes": list(self.notes),
        }

    def _pairs(self) -> list[tuple[str, int]]:
        return sorted({(one.contestant, one.batch) for one in self.samples}, key=self._place)

    def _place(self, pair: tuple[str, int]) -> tuple[int, int]:
        return list(self.load_s).index(pair[0]), pair[1]

    def _medians(self, name: str, batch: int) -> dict[str, float]:
        mine = [one for one in self.samples if (one.contestant, one.batch) == (name, batch)]
        values = [asdict(one.figures) for one in mine]
        # Later laps begin with what larger batches left behind.
        memory = {key: float(value) for key, value in asdict(mine[0].memory).items()}
        return {key: _median([value[key] for value in values]) for key in values[0]} | memory

    def _rows(self) -> list[list[str]]:
        return [[name, str(batch), *_cells(self._medians(name, batch))] for name, batch in self._pairs()]

    def _ratios(self) -> list[list[str]]:
        rows = []
        for one in self.findings:
            bound = f"{'at least' if one.at_least else 'at most'} {one.bound:g}"
            if one.ratio is None:
                rows.append([one.text, "not measured", bound, ""])
            else:
                rows.append([one.text, f"{one.ratio:.2f}", bound, "met" if one.met else "missed"])
        return rows


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _cells(medians: dict[str, float]) -> list[str]:
    return [
        f"{medians['resident_bytes'] / 1e6:.0f}",
        f"{medians['peak_bytes'] / 1e6:.0f}",
        f"{medians['latency_s']:.2f}",
        f"{medians['tokens_per_s']:.1f}",
        "-" if math.isnan(medians["decode_tokens_per_s"]) else f"{medians['decode_tokens_per_s']:.1f}",
        *(f"{medians[key] * 1e3:.1f}" for key in ("ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s")),
    ]


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}
