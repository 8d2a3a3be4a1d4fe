"""The trial process. Owns: the one child in which formats are compiled first, and its end.

Must not know: vocabularies or sequences. See `grammar_trial` for why it is a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from services.common import logs
from services.common.errors import ArgumentInvalid, InternalError
from services.worker.core.format import CHOICE_BYTES_MAX, CHOICES_MAX, Format, FormatBusy, FormatKind

# Interpreter and library start in a tenth of a second on an idle machine.
START_LIMIT_S = 10.0

# A schema of three hundred fields takes five milliseconds. The worker compiles what passes once more, so that
# both together take no more than twice this.
TRIAL_LIMIT_S = 1.0

# Each one before has its second; with more an honest format would wait longer than its client does.
WAITING_MAX = 8

# Longer than any reply. Choices are the longest format; two layers of JSON carry them, in which a control
# character, one byte, takes seven: `\\u0001`. The eighth is for quotes and bars between choices.
LINE_BYTES_MAX = 8 * CHOICES_MAX * CHOICE_BYTES_MAX

PROGRAM = Path(__file__).with_name("grammar_trial.py")

_FIRST = Format(FormatKind.CHOICE, ("a",))

# How a child fails that a format was too much for.
_OVERCOME = (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


class TrialProcess:
    """Compiles formats in a child that is started when first needed, and killed when it takes too long."""

    def __init__(self, *, limit_s: float = TRIAL_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._child: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0

    async def compile(self, form: Format) -> str:
        """Returns the library's grammar for a format.

        Raises:
            ArgumentInvalid: The format is not well-formed, or takes too long.
            FormatBusy: Too many others wait.
        """
        if self._waiting >= WAITING_MAX:
            raise FormatBusy
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                return await self._try(form)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        # With more in the buffer than its bound the pipe is not read, so its end is not seen and `wait` would
        # not return. The error: somebody reads already, and sees the end.
        assert child.stdout is not None
        with contextlib.suppress(RuntimeError):
            await child.stdout.read()
        await child.wait()

    async def _try(self, form: Format) -> str:
        child = await self._running()
        try:
            async with asyncio.timeout(self._limit_s):
                reply = await _ask(child, form)
        except BaseException as error:
            # Whatever it was: what is left of the reply would be taken for that to the next format.
            await self.close()
            if not isinstance(error, _OVERCOME):
                raise
            logs.get_logger().warning("format.refused", kind=form.kind.value, cause="too complex")
            raise ArgumentInvalid(f"format.{form.kind}: is too complex to compile.") from None
        if "flaw" in reply:
            raise ArgumentInvalid(f"format.{form.kind}: {reply['flaw']}")
        return reply["grammar"]

    async def _running(self) -> asyncio.subprocess.Process:
        """The child, after it has shown that it works."""
        if self._child is None or self._child.returncode is not None:
            self._child = child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                str(PROGRAM),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=LINE_BYTES_MAX,
            )
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await _ask(child, _FIRST)
            except BaseException as error:
                await self.close()
                if isinstance(error, Exception):
                    raise InternalError("The helper that compiles formats does not start.") from error
                raise
        return self._child


async def _ask(child: asyncio.subprocess.Process, form: Format) -> dict[str, str]:
    assert child.stdin is not None
    assert child.stdout is not None
    line = json.dumps({"kind": form.kind.value, "texts": form.texts})
    child.stdin.write(line.encode() + b"\n")
    await child.stdin.drain()
    reply: dict[str, str] = json.loads(await child.stdout.readuntil(b"\n"))
    return reply
