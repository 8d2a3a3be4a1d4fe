"""A contestant as a race sees it. Owns: its process, from the start to the end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bench.race.contestant import Entry
from bench.race.process_memory import Memory
from bench.race.work import Figures, Trace, Work, figures
from services.local import leash

# It closes a model or ends a server; whatever takes longer is killed.
_END_S_MAX = 15.0


class ContestantFailed(Exception):
    """A contestant could not be loaded, or ended; the message holds its last words."""


class Child:
    """A contestant in its own process, which begins to load; a context manager that ends it.

    Args:
        entry: Who it is.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        program = [sys.executable, "-m", "bench.race.contestant"]
        # The kernel ends it if this process is killed.
        tied = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *program]
        path = os.pathsep.join(one or str(Path.cwd()) for one in sys.path)
        self._process = subprocess.Popen(
            tied,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.load_s = 0.0
        self._tell(asdict(entry))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def await_loaded(self) -> None:
        """Waits until it can work; raises ContestantFailed when it never will."""
        self.load_s = float(self._hear()["load_s"])

    def measure(self, work: Work) -> tuple[Figures, Memory]:
        """Lets it work; returns its figures, and its memory after and during the work."""
        reply = self._ask({"prompts": work.prompts, "new_tokens": work.new_tokens})
        trace = Trace(tuple(map(tuple, reply["arrivals_s"])))
        gathered = Trace(tuple(map(tuple, reply["gathered_s"]))) if reply["gathered_s"] else None
        try:
            for one in (trace, gathered or trace):
                one.check(work)
        except ValueError as error:
            raise ContestantFailed(f"{self.entry.kind}: {error}") from None
        return figures(trace, gathered), Memory(reply["resident_bytes"], reply["peak_bytes"])

    def second_turn_s(self, turns: Sequence[Sequence[int]], share: float) -> float:
        """The time to the first token of a chat's second turn; only Interlock's own engine tells it."""
        return float(self._ask({"turns": turns, "share": share})["ttft_s"])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._tell(request)
        return self._hear()

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # Whether it still reads shows when it is heard.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise self._failed()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failed(self) -> ContestantFailed:
        self._process.wait()
        self._log.seek(0)
        words = self._log.read().strip().splitlines() or ["it said nothing"]
        return ContestantFailed(f"{self.entry.kind}: {words[-1]}")
