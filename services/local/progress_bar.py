"""A fetch on the terminal. Owns: the progress bar of the four steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from services.local.model_store import Progress, Step

_TITLES = {
    Step.DOWNLOAD: "Downloading",
    Step.VERIFY: "Verifying",
    Step.EXTRACT: "Extracting",
    Step.CONVERT: "Converting",
}


@contextmanager
def shown(name: str, store: Path) -> Iterator[Progress]:
    """Shows the steps of fetching `name` on standard error, as long as the block runs."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[amount]:>10}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    console.print(f"Fetching {name} (once; it stays in {store})", highlight=False, soft_wrap=True)
    with Bars(*columns, console=console) as bars:
        steps = _Steps(bars)
        yield steps
        steps.end()


class _Steps:
    """One bar a step."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._step: Step | None = None
        self._task = bars.add_task("", visible=False, amount="")

    def __call__(self, step: Step, done_bytes: int, total_bytes: int) -> None:
        if step is not self._step:
            self.end()
            self._step = step
            self._task = self._bars.add_task(_TITLES[step], total=None, amount="")
        # What has no bytes to count shows that it moves, and how long it takes.
        amount = f"{total_bytes / 1e6:.0f} MB" if total_bytes > 1 else ""
        self._bars.update(self._task, completed=done_bytes, total=total_bytes or None, amount=amount)

    def end(self) -> None:
        if self._step is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        total = task.total or 1
        self._bars.update(self._task, completed=total, total=total)
