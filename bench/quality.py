"""Measures what quantization costs: perplexity of an English text, and whether answers repeat.

    python -m bench.quality [MODEL_DIRECTORY] [--modes fp32 bf16 int8 int8-bitsandbytes nf4 fp4]
        [--json FILE] [--write docs/benchmarks.md] [--quick]

Perplexity is that of the language reference which Python carries for its own help (`pydoc_data.topics`), cut
into windows that are scored each by itself. Agreement is the share of greedy answers that come out token for
token the same: in a batch as alone, and cut at some token and continued as in one piece.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.race import own_engine, prompts
from bench.race.command_line import add_machine, add_model, as_told
from bench.race.goals import BITSANDBYTES
from bench.race.machine_facts import machine_line
from bench.race.own_engine import MODES, Machine, OwnEngine
from bench.race.progress import shown
from bench.race.section import replace_section, table

if TYPE_CHECKING:
    from services.worker.adapters.torch_runner import TorchRunner

SECTION = "bench.quality"

# Where answers are cut; the n-th answer is cut at the n-th of these, over and over.
CUTS = (7, 20, 41)

HEAD = [
    "weights",
    "perplexity",
    "to fp32",
    "memory of weights, MB",
    "alone = in a batch",
    "cut = in one piece",
]


@dataclass(frozen=True, slots=True)
class Quality:
    """What one mode came to.

    Attributes:
        mode: Its name.
        perplexity: Of the text.
        tokens: How many of them were scored.
        weights_bytes: Memory of the weights.
        alike_in_batch: The share of answers that are the same alone and beside all others.
        alike_continued: The share of answers that are the same in one piece and continued.
        seconds: How long it took, without loading.
    """

    mode: str
    perplexity: float
    tokens: int
    weights_bytes: int
    alike_in_batch: float
    alike_continued: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Quick:
    """What `--quick` measures: enough to see that everything works."""

    tokens: int = 128
    window: int = 32
    answers: int = 2
    prompt_tokens: int = 8
    answer_tokens: int = 10


def main(argv: Sequence[str] | None = None) -> int | None:
    """Loads the model once for each mode and measures the same."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parse(given)
    found = [_measure(arguments, mode) for mode in arguments.modes]
    text = _markdown(arguments, as_told(SECTION, given), found)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    if arguments.write:
        replace_section(arguments.write, SECTION, text)
    return 0


def _measure(arguments: argparse.Namespace, mode: str) -> Quality:
    machine = Machine(arguments.device, arguments.threads, arguments.answers, arguments.kv_bytes)
    runner = own_engine.load(arguments.model, MODES[mode], machine)
    try:
        windows = _windows(arguments)
        began_s = time.perf_counter()
        with shown(len(windows) + 2 * arguments.answers + 1) as show:
            perplexity = _perplexity(runner, windows, lambda: show(f"{mode}: perplexity"))
            in_batch, continued = _agreement(arguments, runner, lambda: show(f"{mode}: agreement"))
        return Quality(
            mode=mode,
            perplexity=perplexity,
            tokens=sum(map(len, windows)),
            weights_bytes=runner.facts.weights_bytes,
            alike_in_batch=in_batch,
            alike_continued=continued,
            seconds=round(time.perf_counter() - began_s, 1),
        )
    finally:
        runner.close()


def _perplexity(
    runner: TorchRunner, windows: Sequence[tuple[int, ...]], on_start: Callable[[], None]
) -> float:
    import torch  # noqa: PLC0415 - the loader has set its environment

    total, scored = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            on_start()
            logits = runner.score(window)[:-1].float()
            wanted = torch.tensor(window[1:], device=logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            scored += len(window) - 1
    return math.exp(total / scored)


def _agreement(
    arguments: argparse.Namespace, runner: TorchRunner, on_start: Callable[[], None]
) -> tuple[float, float]:
    """The shares of answers that are alike in a batch, and continued."""
    engine, tokens = OwnEngine(runner), arguments.answer_tokens
    asked = prompts.cut(arguments.model, arguments.answers, arguments.prompt_tokens)
    alone: list[list[int]] = []
    continued: list[list[int]] = []
    for number, prompt in enumerate(asked):
        on_start()
        alone += engine.answer([prompt], tokens)[0]
        on_start()
        head = tuple(alone[-1][: min(CUTS[number % len(CUTS)], tokens - 1)])
        rest = engine.answer([prompt], tokens, [head])[0][0]
        continued.append([*head, *rest])
    on_start()
    together, _ = engine.answer(asked, tokens)
    return _alike(alone, together), _alike(alone, continued)


def _alike(ones: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    return sum(one == other for one, other in zip(ones, others, strict=True)) / len(ones)


def _windows(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    ids, size = prompts.text_ids(arguments.model, arguments.tokens), arguments.window
    return [ids[first : first + size] for first in range(0, len(ids) - size + 1, size)]


def _markdown(arguments: argparse.Namespace, command: str, found: Sequence[Quality]) -> str:
    exact = next((one.perplexity for one in found if one.mode == "fp32"), None)
    what = (
        f"Perplexity over {found[0].tokens:,} tokens in windows of {arguments.window}; agreement of "
        f"{arguments.answers} greedy answers of {arguments.answer_tokens} tokens, cut at "
        f"{', '.join(map(str, CUTS))} in turn."
    )
    rows = [_row(one, exact) for one in found]
    parts = [f"`{command}`", f"{machine_line(arguments.threads)} {what}", table(HEAD, rows)]
    return "\n\n".join([*parts, *_against_bitsandbytes(found)])


def _against_bitsandbytes(found: Sequence[Quality]) -> list[str]:
    """The comparison that int8 over integer products is held to, where both were measured."""
    by_mode = {one.mode: one.perplexity for one in found}
    if not {"int8", BITSANDBYTES} <= by_mode.keys():
        return []
    ratio = by_mode["int8"] / by_mode[BITSANDBYTES]
    told = f"{100 * (ratio - 1):+.2f} % (goal: within 1 %)"
    return [f"Perplexity of int8 to that of bitsandbytes' own modules: {told}."]


def _row(one: Quality, exact: float | None) -> list[str]:
    return [
        one.mode,
        f"{one.perplexity:.3f}",
        "-" if exact is None else f"{100 * (one.perplexity / exact - 1):+.2f} %",
        f"{one.weights_bytes / 1e6:.0f}",
        f"{100 * one.alike_in_batch:.0f} %",
        f"{100 * one.alike_continued:.0f} %",
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    what = parser.add_argument_group("what is measured")
    modes = ["fp32", "bf16", "int8", "int8-bitsandbytes", "nf4", "fp4"]
    what.add_argument("--modes", nargs="+", choices=list(MODES), default=modes)
    what.add_argument("--tokens", type=int, default=20_480)
    what.add_argument("--window", type=int, default=512)
    what.add_argument("--answers", type=int, default=16, help="together in a batch, and each alone")
    what.add_argument("--prompt-tokens", type=int, default=42)
    what.add_argument("--answer-tokens", type=int, default=64)
    what.add_argument("--quick", action="store_true", help="a few tokens: whether everything works")
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
