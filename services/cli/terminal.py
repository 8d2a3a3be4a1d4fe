"""What `interlock up` says. Owns: the words on the terminal, from the first part to the last."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from services.local.child import Exited, NotStarted, Started
from services.local.home import DEFAULT, Home
from services.local.mesh import ModelRead, PartReady
from services.local.session import MeshReady, Notice, Stopping
from services.local.state import MeshState

_METHOD = "interlock.v1.GatewayService/Generate"
_QUESTION = "What is the capital of France?"
# What may be over at the next line: a full disk, a reader that is slow.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN}


class Terminal:
    """Prints what happens to a mesh.

    Args:
        home: Its home.
        fetch_s: How long the model took to be there.
    """

    def __init__(self, home: Home, fetch_s: float) -> None:
        self._home = home
        self._fetch_s = fetch_s
        self._took_s: dict[str, float] = {}
        self._ready = False

    def tell(self, notice: Notice) -> None:
        """Prints one notice. Never fails: a mesh goes on, and stops in order, with nobody left to read."""
        match notice:
            case PartReady():
                self._took_s[notice.id] = notice.took_s
                _say(f"  {notice.id:<14} ready after {notice.took_s:5.1f} s   {notice.address}")
            case ModelRead():
                share = notice.read_bytes / max(notice.size_bytes, 1)
                _say(f"  {notice.id:<14} reads the model: {share:.0%} of {notice.size_bytes / 1e9:.1f} GB")
            case MeshReady():
                self._ready = True
                self._tell_ready(notice.state)
            case Exited():
                # Before everything is ready a crash may end the start instead.
                again = f"; starting again in {notice.restart_in_s:.1f} s" if self._ready else ""
                _say(f"  {notice.id:<14} {_how(notice.code)}{again}")
            case NotStarted():
                again = f"starting again in {notice.restart_in_s:.1f} s"
                _say(f"  {notice.id:<14} could not be started ({notice.reason}); {again}")
            case Started() if self._ready:
                _say(f"  {notice.id:<14} started again (process {notice.pid})")
            case Stopping():
                answers = "; running answers may end within 30 s" if self._ready else ""
                _say(f"Stopping{answers} (Ctrl-C again: at once)")

    def _tell_ready(self, state: MeshState) -> None:
        start_s = max(self._took_s.values(), default=0.0)
        _say(f"\nReady. The model was there after {self._fetch_s:.1f} s, the mesh {start_s:.1f} s later.\n")
        _say(invitation(self._home, state))


def invitation(home: Home, state: MeshState) -> str:
    """Where the mesh is, and lines to paste."""
    token = f'"authorization: Bearer $(cat {shlex.quote(_short(home.token_file))})"'
    address = state.http.removeprefix("http://")
    body = f"""'{{"text": "{_QUESTION}"}}'"""
    prefix = "" if home.path == Path(DEFAULT).absolute() else f"INTERLOCK_HOME={shlex.quote(str(home.path))} "
    return "\n".join(
        (
            f"  URL     {state.http}",
            f"  Model   {state.model}",
            f"  Logs    {_short(home.logs)}",
            "",
            "Try:",
            f"  curl -H {token} -H 'content-type: application/json' -d {body} {state.http}/v1/generate",
            "",
            f"  {_tool('grpcurl')} -plaintext -H {token} -d {body} {address} {_METHOD}",
            "",
            f'  {prefix}{_tool("interlock")} chat "{_QUESTION}"',
        )
    )


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in _PASSING:
            _fall_silent()
    except ValueError:
        # Closed, or of an encoding without these letters.
        return


def _fall_silent() -> None:
    """Writes nowhere from now on: the reader of a pipe has ended, or the terminal was closed."""
    # What could not be written stays in the buffer. Python flushes it at its end, and would fail there.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    return f"was ended by {signal.Signals(-code).name}"


def _short(path: Path) -> str:
    """The path as seen from here, when it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _tool(name: str) -> str:
    """A command of this environment: by its name where the shell finds it."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if (found and Path(found).resolve() == beside.resolve()) or not os.access(beside, os.X_OK):
        return name
    return shlex.quote(_short(beside))
