"""The chart of a load measurement. Owns: how it looks; the only part that needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("goodput, tokens/s", lambda step: step["goodput_tokens_per_s"]),
    ("time to the first token, p50, s", lambda step: _in_seconds(step["ttft_ms"]["p50"])),
    ("share of attempts refused", lambda step: step["shed_rate"]),
)
_LINES = ((True, "with the queue", "o-", "#1b6ca8"), (False, "without", "s--", "#c8553d"))


def draw(steps: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the closed-loop steps against their clients into a PNG file; of repeated ones, the median."""
    # Imported here: everything else works without it, and choosing a backend is for this function alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - see above
    from matplotlib.figure import Figure  # noqa: PLC0415 - see above

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, value) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for queue, name, style, colour in _LINES:
            known = _points(value, [step for step in steps if step["queue"] is queue])
            if known:
                axes.plot(*zip(*known, strict=True), style, color=colour, label=name, markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("clients")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(path, format="png", dpi=90)


def _points(
    value: Callable[[dict[str, Any]], float | None], steps: Sequence[dict[str, Any]]
) -> list[tuple[int, float]]:
    """The median of what was measured for each number of clients."""
    found: dict[int, list[float]] = {}
    for step in steps:
        if (measured := value(step)) is not None:
            found.setdefault(step["clients"], []).append(measured)
    return [(clients, statistics.median(values)) for clients, values in sorted(found.items())]


def _in_seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000
