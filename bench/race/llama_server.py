"""A llama.cpp server as a contestant. Owns: its process, and the client that reads its streams.

The client is as light as can be, for it shares the cores with the server: one connection for each request,
one JSON line for each token.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.race.work import Trace, Work
from services.local import leash

HOST = "127.0.0.1"

# Loading a small model takes a second; a large one that takes longer than this is no contestant.
START_S_MAX = 120.0
STOP_S_MAX = 10.0

# A line of a stream holds one token and its settings at the end; asyncio's own limit is enough for both,
# but not for what the last event repeats of a long prompt.
_LINE_BYTES_MAX = 1 << 24


class LlamaServer:
    """A server of its own on a free port of the loopback interface.

    Args:
        program: The `llama-server` binary.
        file: The GGUF file.
        slots: Sequences at once.
        context_tokens: Prompt and answer of one sequence.
        threads: Threads for single tokens and for batches.
    """

    def __init__(self, program: Path, file: Path, slots: int, context_tokens: int, threads: int) -> None:
        self._port = _free_port()
        # Its log goes to a file without a name: a pipe that nobody reads would fill and stop it.
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the server
        command = [str(program), "--model", str(file), "--host", HOST, "--port", str(self._port)]
        command += ["--threads", str(threads), "--threads-batch", str(threads)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * context_tokens)]
        # The kernel ends the server if this process is killed.
        tied = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *command]
        self._process = subprocess.Popen(
            tied, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._await_health()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The server's process id: its memory is what counts."""
        return self._process.pid

    def run(self, work: Work) -> Trace:
        """Does the work."""
        return asyncio.run(self._run(work))[1]

    def answer(self, work: Work) -> list[list[int]]:
        """Does the work and returns the token ids of the answers."""
        return asyncio.run(self._run(work))[0]

    def close(self) -> None:
        """Ends the server."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    async def _run(self, work: Work) -> tuple[list[list[int]], Trace]:
        began_s = time.perf_counter()
        streams = (_stream(self._port, prompt, work.new_tokens) for prompt in work.prompts)
        found = await asyncio.gather(*streams)
        ids = [[token for token, _ in answer] for answer in found]
        arrivals = tuple(tuple(when_s - began_s for _, when_s in answer) for answer in found)
        return ids, Trace(arrivals)

    def _await_health(self) -> None:
        give_up_s = time.monotonic() + START_S_MAX
        while not self._healthy():
            if self._process.poll() is not None:
                self._log.seek(0)
                last = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
                raise RuntimeError("The llama.cpp server ended: " + " / ".join(last))
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"The llama.cpp server was not ready after {START_S_MAX:.0f} s.")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._port}/health", timeout=1.0) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


async def _stream(port: int, prompt: tuple[int, ...], new_tokens: int) -> list[tuple[int, float]]:
    """The tokens of one answer, and when each arrived by `time.perf_counter`."""
    body = json.dumps(_request(prompt, new_tokens)).encode()
    reader, writer = await asyncio.open_connection(HOST, port, limit=_LINE_BYTES_MAX)
    try:
        head = f"POST /completion HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        found: list[tuple[int, float]] = []
        async for event in _events(reader):
            now_s = time.perf_counter()
            found.extend((token, now_s) for token in event.get("tokens", ()))
            if event.get("stop"):
                break
        return found
    finally:
        writer.close()


def _request(prompt: tuple[int, ...], new_tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "n_predict": new_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
    }


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a reply; raises RuntimeError when the server refuses."""
    status = (await reader.readline()).decode()
    if " 200 " not in status:
        raise RuntimeError(f"The llama.cpp server answered: {status.strip()}")
    while (await reader.readline()).strip():
        pass
    rest = b""
    while size := int((await reader.readline()).strip() or b"0", 16):
        rest += await reader.readexactly(size)
        await reader.readline()
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
