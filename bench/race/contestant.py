"""A contestant in a process of its own. Owns: what is said between a race and its contestants.

Run as `python -m bench.race.contestant`, once for each contestant, so that memory is that of one alone. It
reads one JSON object a line: first its `Entry`, then one piece of work after another; and answers each with
one line. What libraries print goes to standard error, so that nothing of theirs gets between the lines.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from bench.race import own_engine
from bench.race.own_engine import MODES, Machine, OwnEngine
from bench.race.process_memory import memory_of, reset_peak
from bench.race.work import Trace, Work, decode_rate

# The kinds that are not Interlock's own modes.
GENERATE, CONTINUOUS, LLAMA = "transformers-generate", "transformers-continuous", "llama.cpp"

# Of the first turn of a chat; they belong to the second one's prompt.
FIRST_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """Who takes part, and with what.

    Attributes:
        kind: A name of `MODES`, or one of the peers above.
        directory: The model in Hugging Face format.
        machine: What it may use.
        context_tokens: Prompt and answer of one sequence.
        program: The llama.cpp server, where that is the contestant.
        gguf: Its model.
    """

    kind: str
    directory: str
    machine: Machine
    context_tokens: int
    program: str = ""
    gguf: str = ""


class Runner(Protocol):
    """Something that does work."""

    def run(self, work: Work) -> Trace:
        """Does it and tells when each token arrived."""
        ...

    def close(self) -> None:
        """Leaves nothing behind."""
        ...


class _Own:
    """Interlock's engine, which can also be asked for a chat's second turn."""

    def __init__(self, entry: Entry) -> None:
        self.runner = own_engine.load(Path(entry.directory), MODES[entry.kind], entry.machine)
        self._engine = OwnEngine(self.runner)

    def run(self, work: Work) -> Trace:
        """Does the work."""
        return self._engine.run(work)

    def gathered(self, work: Work, trace: Trace) -> Trace | None:
        """A second run for the decode rate, if the first one has none.

        The engine paces prefill so that running streams feel little of it. When many requests come at once,
        the first have ended before the last begin, and never do all decode. So in this run they wait for
        one another after their first token.
        """
        return self._engine.run_gathered(work) if math.isnan(decode_rate(trace)) else None

    def second_turn_s(self, turns: tuple[tuple[int, ...], tuple[int, ...]], share: float) -> float:
        """The time to the first token of a chat's second turn, with a prefix cache of that share."""
        # Each chat begins with nothing kept, and keeps nothing for the race.
        engine = OwnEngine(self.runner, prefix_share=share)
        first, second = turns
        answers, _ = engine.answer([first], FIRST_ANSWER_TOKENS)
        _, trace = engine.answer([(*first, *answers[0], *second)], 2)
        return trace.arrivals_s[0][0]

    def close(self) -> None:
        """Frees the model."""
        self.runner.close()


def main() -> None:
    """Loads one contestant and lets it work until standard input ends."""
    with _lines() as answer:
        entry = json.loads(sys.stdin.readline())
        entry["machine"] = Machine(**entry["machine"])
        began_s = time.perf_counter()
        runner = open_runner(Entry(**entry))
        try:
            pid = getattr(runner, "pid", os.getpid())
            answer({"load_s": time.perf_counter() - began_s, **asdict(memory_of(pid))})
            for line in sys.stdin:
                answer(_do(runner, pid, json.loads(line)))
        finally:
            runner.close()


def open_runner(entry: Entry) -> Runner:
    """Loads who an entry names, into this process."""
    directory, machine = Path(entry.directory), entry.machine
    if entry.kind in MODES:
        return _Own(entry)
    if entry.kind == LLAMA:
        from bench.race.llama_server import LlamaServer  # noqa: PLC0415 - one contestant, one set of libraries

        program, file = Path(entry.program), Path(entry.gguf)
        return LlamaServer(program, file, machine.slots, entry.context_tokens, machine.threads)
    from bench.race import transformers_peers as peers  # noqa: PLC0415 - as above

    if entry.kind == GENERATE:
        return peers.StaticGenerate(directory, machine)
    return peers.ContinuousBatching(directory, machine)


def _do(runner: Runner, pid: int, request: dict[str, Any]) -> dict[str, Any]:
    if (turns := request.get("turns")) is not None:
        assert isinstance(runner, _Own)
        first, second = map(tuple, turns)
        return {"ttft_s": runner.second_turn_s((first, second), request["share"])}
    work = Work(tuple(map(tuple, request["prompts"])), request["new_tokens"])
    reset_peak(pid)
    trace = runner.run(work)
    reply = {"arrivals_s": trace.arrivals_s, **asdict(memory_of(pid))}
    gathered = runner.gathered(work, trace) if isinstance(runner, _Own) else None
    return reply | {"gathered_s": None if gathered is None else gathered.arrivals_s}


@contextmanager
def _lines() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keeps standard output for answers; whatever else writes to it reaches standard error."""
    out: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=out, flush=True)

    with out:
        yield answer


if __name__ == "__main__":
    main()
