"""One supervised process. Owns: its start, its output, its restarts with growing pauses, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.clock import Clock
from services.local.log_file import LogFile, size_bytes
from services.local.output_pipe import OutputPipe

_LEASH = Path(__file__).with_name("leash.py")

# The first restart is quick, for a crash is usually single; a process that cannot start must not keep the
# machine busy, and ten seconds are about what a person waits.
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
# Whoever ran this long was well: its next crash begins with the first pause again.
STEADY_S = 30.0
# After SIGKILL only the kernel stands between a process and its end.
_KILL_WAIT_S = 5.0


def backoff_s(crashes: int) -> float:
    """The pause before the restart after this many crashes in a row, from 1."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(crashes - 1, 16)))


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a process once.

    Attributes:
        argv: The program and its arguments.
        environment: Everything it sees.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Started:
    """A process runs."""

    id: str
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended though nobody had asked it to.

    Attributes:
        id: Its name.
        code: Its exit code; negative: the signal that ended it.
        restart_in_s: The pause before it is started again.
    """

    id: str
    code: int
    restart_in_s: float


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The machine refused to start a process again that had ended.

    Attributes:
        id: Its name.
        reason: What it said.
        restart_in_s: The pause before the next try.
    """

    id: str
    reason: str
    restart_in_s: float


Event = Started | Exited | NotStarted


class Child:
    """A process that is kept running until `stop`.

    Args:
        id: Its name, also of its log file.
        launch: Asked before every start, since a restart may be told what the first start found out.
        log: The log file.
        clock: For the length of its runs.
        tell: Hears of starts and crashes; its own failures are nobody's here.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the field's name everywhere
        launch: Callable[[], Launch],
        log: Path,
        clock: Clock,
        tell: Callable[[Event], None],
    ) -> None:
        self.id = id
        self.log = log
        # What the log held before: the words of an earlier run explain nothing of this one.
        self.log_start_bytes = size_bytes(log)
        self.crashes = 0
        self._launch = launch
        self._clock = clock
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._crashed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None while it is not running."""
        process = self._process
        return process.pid if process and process.returncode is None else None

    async def start(self) -> None:
        """Starts the process and keeps it running.

        Raises:
            OSError: The program cannot be started at all, or its log cannot be written.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._keep(started), name=f"child-{self.id}")
        await asyncio.wait({self._watch, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._watch.done():
            self._watch.result()

    async def crashed(self) -> None:
        """Returns when the process has ended once without being asked to."""
        await self._crashed.wait()

    def kill(self) -> None:
        """Ends the process's whole group at once; it is not started again."""
        self._stopping.set()
        self._signal_group(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Asks the process to end, and after `grace_s` ends its whole group."""
        self._stopping.set()
        if self._watch is None:
            return
        if self.pid is not None and self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # A stopped process does not see SIGTERM before it goes on.
            self._process.send_signal(signal.SIGCONT)
        done, _ = await asyncio.wait({self._watch}, timeout=grace_s)
        if not done:
            self._signal_group(signal.SIGKILL)
            await asyncio.wait({self._watch}, timeout=_KILL_WAIT_S)

    async def _keep(self, started: asyncio.Future[None]) -> None:
        with contextlib.closing(LogFile(self.log)) as log:
            while True:
                began_s = self._clock.monotonic()
                end: int | OSError
                try:
                    end = await self._run(log, started)
                except OSError as error:
                    # The first start is for its caller to judge. Later ones were possible once: a disk or a
                    # process table that is full now may have room again.
                    if not started.done():
                        raise
                    end = error
                if self._stopping.is_set():
                    return
                steady = self._clock.monotonic() - began_s >= STEADY_S
                self.crashes = 1 if steady else self.crashes + 1
                pause_s = backoff_s(self.crashes)
                self._report(log, end, pause_s)
                self._crashed.set()
                if await self._stopped_within(pause_s):
                    return

    def _report(self, log: LogFile, end: int | OSError, pause_s: float) -> None:
        if isinstance(end, OSError):
            log.write(f"supervisor: {self.id} could not be started: {end}\n".encode())
            self._say(NotStarted(self.id, str(end), pause_s))
        else:
            log.write(f"supervisor: {self.id} ended with code {end}\n".encode())
            self._say(Exited(self.id, end, pause_s))

    def _say(self, event: Event) -> None:
        # A terminal that is gone must not end the watch over a process.
        with contextlib.suppress(OSError, ValueError):
            self._tell(event)

    async def _run(self, log: LogFile, started: asyncio.Future[None]) -> int:
        """Runs the process once and returns its exit code."""
        launch = self._launch()
        leash = (sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()))
        with OutputPipe(log) as output:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *leash,
                    *launch.argv,
                    env=dict(launch.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output.write_fd,
                    stderr=output.write_fd,
                    # A session of its own: Ctrl-C reaches the supervisor alone, which knows the order.
                    start_new_session=True,
                )
            except RuntimeError as error:
                # Python 3.11 waits for a process in a thread, which the machine may refuse as well.
                raise OSError(str(error)) from error
            finally:
                output.handed_over()
            self._say(Started(self.id, self._process.pid))
            if not started.done():
                started.set_result(None)
            return await self._process.wait()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _signal_group(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            return
        try:
            # The session's leader is not reaped yet, so the group is surely ours.
            os.killpg(pid, number)
        except ProcessLookupError:
            # It ended between the look and the signal.
            return
