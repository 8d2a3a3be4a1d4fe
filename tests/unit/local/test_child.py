"""Children: kept running with growing pauses, ended with all they have, and never left alone."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.local.child import BACKOFF_MAX_S, Child, Event, Exited, Launch, NotStarted, Started, backoff_s
from services.local.log_file import LogFile, tail
from services.local.supervisor import PartFailed, StopStage, Supervisor
from tests.fakes.local import FakeClock

# Announces itself and waits for a signal, as a server does.
SERVER = "import signal, sys; print('serving', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('serving', flush=True)\n"
    "while True: signal.pause()"
)


def _python(script: str) -> Callable[[], Launch]:
    return lambda: Launch((sys.executable, "-I", "-S", "-c", script), {"PATH": os.environ["PATH"]})


class _Events:
    """What a child told, and the wait for it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self, kind: type[Event]) -> Event:
        while True:
            event = await asyncio.wait_for(self.queue.get(), 10)
            if isinstance(event, kind):
                return event


@asynccontextmanager
async def _child(tmp_path: Path, script: str) -> AsyncIterator[tuple[Child, _Events]]:
    events = _Events()
    child = Child("part-1", _python(script), tmp_path / "part-1.log", FakeClock(), events.queue.put_nowait)
    await child.start()
    try:
        yield child, events
    finally:
        child.kill()
        await child.stop(5)


async def _until_logged(child: Child, text: str) -> None:
    # The log is a file: nothing tells when it grows.
    while text not in tail(child.log):  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_pauses_grow_to_their_bound() -> None:
    """The first restart is quick, each further one twice as late, none later than the bound."""
    pauses = [backoff_s(crashes) for crashes in range(1, 40)]
    assert pauses[:3] == [0.2, 0.4, 0.8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == BACKOFF_MAX_S


async def test_a_crash_is_followed_by_a_restart(tmp_path: Path) -> None:
    """A killed process is started again, under another pid, and the crash is told with its signal."""
    async with _child(tmp_path, SERVER) as (child, events):
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        exited = await events.next(Exited)
        assert exited == Exited("part-1", -signal.SIGKILL, 0.2)
        await events.next(Started)
        assert child.pid not in {None, first}


async def test_a_process_that_cannot_start_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    """Each crash in a row doubles the pause that is told."""
    async with _child(tmp_path, "raise SystemExit(3)") as (child, events):
        pauses = []
        for _ in range(2):
            exited = await events.next(Exited)
            assert isinstance(exited, Exited)
            assert exited.code == 3
            pauses.append(exited.restart_in_s)
        assert pauses == [0.2, 0.4]
        assert "ended with code 3" in tail(child.log)


async def test_a_restart_that_the_machine_refuses_is_tried_again(tmp_path: Path) -> None:
    """A disk that is full for a moment counts as a crash: it is logged and told, and the pause grows."""
    events, starts = _Events(), 0

    def launch() -> Launch:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return _python(SERVER)()

    child = Child("part-1", launch, tmp_path / "part-1.log", FakeClock(), events.queue.put_nowait)
    await child.start()
    try:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        refused = await events.next(NotStarted)
        assert refused == NotStarted("part-1", "[Errno 28] No space left on device", 0.4)
        await events.next(Started)
        assert child.pid is not None
        assert "part-1 could not be started: [Errno 28]" in tail(child.log)
    finally:
        child.kill()
        await child.stop(5)


async def test_a_restart_that_gets_no_thread_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 starts one for each process; where there may be no more, that is no OSError."""
    events, execute = _Events(), asyncio.create_subprocess_exec
    child = Child("part-1", _python(SERVER), tmp_path / "part-1.log", FakeClock(), events.queue.put_nowait)
    await child.start()
    refusals = [RuntimeError("can't start new thread")]

    async def refuse_once(*argv: Any, **options: Any) -> asyncio.subprocess.Process:
        if refusals:
            raise refusals.pop()
        return await execute(*argv, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
    try:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        assert await events.next(NotStarted) == NotStarted("part-1", "can't start new thread", 0.4)
        await events.next(Started)
    finally:
        child.kill()
        await child.stop(5)


async def test_a_listener_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    """A process is started again though whoever is told of its crash cannot hear it."""
    restarted = asyncio.Event()

    def tell(event: Event) -> None:
        if isinstance(event, Started) and child.crashes:
            restarted.set()
        raise BrokenPipeError

    child = Child("part-1", _python(SERVER), tmp_path / "part-1.log", FakeClock(), tell)
    await child.start()
    try:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await asyncio.wait_for(restarted.wait(), 10)
        assert child.pid is not None
    finally:
        child.kill()
        await child.stop(5)


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no more processes"), ValueError("a bad setting")])
async def test_a_first_start_that_fails_is_its_caller_s_to_know(tmp_path: Path, error: Exception) -> None:
    """Whatever the reason, whoever starts a process is told, and does not wait for it."""

    def launch() -> Launch:
        raise error

    child = Child("part-1", launch, tmp_path / "part-1.log", FakeClock(), lambda _: None)
    with pytest.raises(type(error), match=str(error.args[-1])):
        await asyncio.wait_for(child.start(), 10)
    await child.stop(5)


async def test_a_log_that_cannot_be_made_fails_the_start(tmp_path: Path) -> None:
    """The supervisor names the part and the reason, and does not wait for it."""
    supervisor = Supervisor(tmp_path, FakeClock(), lambda _: None)
    (tmp_path / "worker-1.log").mkdir()
    with pytest.raises(PartFailed, match=r"worker-1 cannot be started: .*Is a directory"):
        await asyncio.wait_for(supervisor.start("worker-1", _python(SERVER)), 10)
    await supervisor.stop([StopStage(("worker-1",), 5)], asyncio.Event())


async def test_output_goes_to_the_log(tmp_path: Path) -> None:
    """Standard output and standard error arrive in the child's log."""
    async with _child(tmp_path, SERVER + "#") as (child, _):
        await _until_logged(child, "serving")


async def test_stop_ends_the_process_without_a_restart(tmp_path: Path) -> None:
    """SIGTERM is enough for a process that minds it, and nothing is told as a crash."""
    async with _child(tmp_path, SERVER) as (child, events):
        await _until_logged(child, "serving")
        pid = child.pid
        await child.stop(10)
        assert child.pid is None
        assert pid is not None
        assert not _alive(pid)
        told = [events.queue.get_nowait() for _ in range(events.queue.qsize())]
        assert [type(event) for event in told] == [Started]


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """After its grace the whole group is ended."""
    async with _child(tmp_path, STUBBORN) as (child, _):
        await _until_logged(child, "serving")
        pid = child.pid
        await child.stop(0.1)
        assert pid is not None
        assert not _alive(pid)


async def test_a_stopped_process_can_be_ended(tmp_path: Path) -> None:
    """A process under SIGSTOP still gets its SIGTERM."""
    async with _child(tmp_path, SERVER) as (child, _):
        await _until_logged(child, "serving")
        pid = child.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(child.stop(30), 10)
        assert not _alive(pid)


async def test_a_grandchild_with_the_pipe_does_not_delay_a_restart(tmp_path: Path) -> None:
    """The end of a process counts, though one that it started still holds its output."""
    script = (
        "import subprocess, sys, os\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
        "os._exit(4)"
    )
    async with _child(tmp_path, script) as (child, events):
        group = child.pid
        exited = await events.next(Exited)
        assert isinstance(exited, Exited)
        assert exited.code == 4
        # The grandchild is this test's to end; it is in the group of its parent.
        assert group is not None
        os.killpg(group, signal.SIGKILL)


async def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    """Whoever waits for a child that ends is told its name and its last words."""
    supervisor = Supervisor(tmp_path, FakeClock(), lambda _: None)
    child = await supervisor.start("worker-1", _python("raise SystemExit('no such model')"))
    try:
        with pytest.raises(PartFailed, match=r"worker-1 ended at its start(.|\n)*no such model"):
            await supervisor.ready(child, asyncio.sleep(30), 30)
    finally:
        await supervisor.stop([StopStage(("worker-1",), 5)], asyncio.Event())


async def test_a_start_without_end_is_bounded(tmp_path: Path) -> None:
    """A child that lives but is never ready fails after its time."""
    supervisor = Supervisor(tmp_path, FakeClock(), lambda _: None)
    child = await supervisor.start("worker-1", _python(SERVER))
    try:
        with pytest.raises(PartFailed, match="not ready within"):
            await supervisor.ready(child, asyncio.sleep(30), 0.01)
    finally:
        await supervisor.stop([StopStage(("worker-1",), 5)], asyncio.Event())


async def test_stages_end_one_after_the_other(tmp_path: Path) -> None:
    """A stage is over before the next one is asked to end."""
    order = tmp_path / "order"
    script = (
        "import signal, sys\n"
        "def end(*_):\n    open({path!r}, 'a').write({name!r})\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('serving', flush=True)\nwhile True: signal.pause()"
    )
    supervisor = Supervisor(tmp_path, FakeClock(), lambda _: None)
    for name in ("c", "a", "b"):
        child = await supervisor.start(name, _python(script.format(path=str(order), name=name)))
        await _until_logged(child, "serving")
    stages = [StopStage((name,), 10) for name in ("a", "b", "c")]
    await supervisor.stop(stages, asyncio.Event())
    assert order.read_text() == "abc"


async def test_hurry_kills_at_once(tmp_path: Path) -> None:
    """A second signal does not wait for anybody's grace."""
    supervisor = Supervisor(tmp_path, FakeClock(), lambda _: None)
    child = await supervisor.start("stubborn", _python(STUBBORN))
    await _until_logged(child, "serving")
    pid, hurry = child.pid, asyncio.Event()
    assert pid is not None
    asyncio.get_running_loop().call_later(0.05, hurry.set)
    await asyncio.wait_for(supervisor.stop([StopStage(("stubborn",), 600)], hurry), 10)
    assert not _alive(pid)


def test_no_child_survives_a_killed_supervisor(tmp_path: Path) -> None:
    """SIGKILL of the supervisor ends its children, though they ignore SIGTERM and have their own session."""
    script = f"""
import asyncio, pathlib, signal, sys
from services.common.system_clock import SystemClock
from services.local.child import Child, Launch

async def main():
    launch = lambda: Launch((sys.executable, "-c", {STUBBORN!r}), {{}})
    child = Child("part", launch, pathlib.Path(sys.argv[1]), SystemClock(), lambda _: None)
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "part.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        while "serving" not in tail(tmp_path / "part.log"):
            time.sleep(0.01)
        assert _alive(pid)
        supervisor.kill()
        supervisor.wait()
    end_s = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < end_s, "the child lives on"
        time.sleep(0.01)


def test_a_log_is_bounded(tmp_path: Path) -> None:
    """A full log becomes `.1`, and what was there before is dropped."""
    log = LogFile(tmp_path / "part.log", bytes_max=100)
    for number in range(50):
        log.write(f"line {number:03}\n".encode())
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"part.log", "part.log.1"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200
    assert tail(tmp_path / "part.log", 1) == "line 049"


def test_the_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    """A process that never wrote has no last words."""
    assert tail(tmp_path / "absent.log") == ""
