"""Faults for the workers of a real mesh: Python runs this at its start where it is on the search path.

A worker whose `FAULT_FILE` holds the name of a revision cannot compute with it, from one step to the next, as
a kernel fails that meets what it was never tried with. Other processes are left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


class FaultyRunner:
    """A revision's runner that fails while the file names the revision."""

    def __init__(self, revision: str, runner: Any, file: Path) -> None:
        self._revision, self._runner, self._file = revision, runner, file

    def __getattr__(self, name: str) -> Any:
        """All that is not a step is the runner's own."""
        return getattr(self._runner, name)

    def step(self, batch: Any) -> Any:
        """See `ModelRunner.step`."""
        if self._file.exists() and self._file.read_text() == self._revision:
            raise RuntimeError("a fault that a test asked for")
        return self._runner.step(batch)


def _install(file: Path) -> None:
    from services.worker.core.stepper import Stepper  # noqa: PLC0415 - in workers alone

    host = Stepper._host

    def host_faulty(self: Stepper, revision: str, runner: Any) -> None:
        host(self, revision, FaultyRunner(revision, runner, file))

    Stepper._host = host_faulty  # type: ignore[method-assign]


if "services.worker" in sys.orig_argv and "FAULT_FILE" in os.environ:
    _install(Path(os.environ["FAULT_FILE"]))
