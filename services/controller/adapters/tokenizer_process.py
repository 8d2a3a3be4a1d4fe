"""The process in which a tokenizer is read first. Owns: its start, its end, and what its end means.

Must not know: what a tokenizer is. See `tokenizer_trial` for why it is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from services.common import logs
from services.common.errors import ArtifactInvalid, InternalError
from services.controller.adapters import tokenizer_trial

# Its own limits end it earlier; this is for one that cannot even be killed by them.
GRACE_S = 10.0
# A traceback's end names the error.
TRACE_CHARS_MAX = 2_000

# Credentials of the artifacts' store are in the environment too, by names that only its library knows.
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ")

_PROGRAM = "services.controller.adapters.tokenizer_trial"


async def try_tokenizer(directory: Path) -> None:
    """Reads the tokenizer and the chat template in a process of its own.

    Raises:
        ArtifactInvalid: They are missing or not usable, or take too much time or memory.
        InternalError: The process does not start.
    """
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", _PROGRAM, str(directory)),
        env=_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, trace = b"", b""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(tokenizer_trial.LIMIT_S + GRACE_S):
                told, trace = await child.communicate()
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()
    if child.returncode == tokenizer_trial.FLAWED:
        raise ArtifactInvalid(told.decode(errors="replace"))
    if child.returncode is None or child.returncode < 0:
        logs.get_logger().warning("tokenizer.refused", status=child.returncode)
        raise ArtifactInvalid(
            "tokenizer.json: reading it takes too much time or memory; send the tokenizer in a simpler form."
        )
    if child.returncode:
        text = trace.decode(errors="replace")[-TRACE_CHARS_MAX:]
        logs.get_logger().error("tokenizer.untried", status=child.returncode, trace=text)
        raise InternalError("The helper that reads tokenizers does not start.")


def _environment() -> dict[str, str]:
    """What the child needs: where we find modules, one thread, and nothing that anybody could misuse."""
    ours = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**ours, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": "1"}
