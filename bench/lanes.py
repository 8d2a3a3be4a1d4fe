"""Measures a step of int8 both ways, all together and in lanes, by the number of sequences; one JSON.

    python -m bench.lanes MODEL_DIRECTORY [--rows 32 16 8] [--rounds 30] [--busy 0.3]

The two ways take turns within every round. `--busy` is the share of a core that another process wants
meanwhile, a millisecond at a time: what a mesh's gateway and Envoy do beside a worker on the same cores. The
ways must give the same bits, or this fails. Two threads, or three: others have no lanes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from services.worker.adapters import library_environment

if TYPE_CHECKING:
    from services.worker.adapters.fused_lanes import FusedLanes, Tokens

# Far from special tokens, and inside every vocabulary in use.
TOKEN_FIRST, TOKEN_SPAN = 100, 4_000
# Positions that are filled before anything is measured.
PROMPT = 60
# Steps of one way before it is the other one's turn.
STEPS = 5
_WAYS = ("together", "lanes")
# A process that computes for so long, and sleeps for as long as its share leaves.
_BURST_S = 0.001
_BUSY = """
import sys, time
while True:
    until_s = time.perf_counter() + float(sys.argv[1])
    while time.perf_counter() < until_s: pass
    time.sleep(float(sys.argv[2]))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model once, measures every number of sequences, and prints."""
    arguments = _parse(argv)
    # Before torch is imported, as a worker does.
    threads = library_environment.prepare(arguments.threads)
    lanes = _load(arguments.model, threads, max(arguments.rows))
    found: dict[int, dict[str, list[float]]] = {rows: {} for rows in arguments.rows}
    with _busy(arguments.busy), Progress(transient=True) as progress:
        for _ in progress.track(range(arguments.rounds), description="measuring"):
            for rows in random.sample(arguments.rows, len(arguments.rows)):
                _measure(lanes, _tokens(rows), found[rows])
    print(json.dumps({"threads": threads, "busy": arguments.busy, "rows": report(found)}, indent=2))


def report(found: dict[int, dict[str, list[float]]]) -> dict[int, dict[str, float]]:
    """Medians over all steps, in milliseconds, and how many times as fast the lanes are."""
    figures: dict[int, dict[str, float]] = {}
    for rows, samples in found.items():
        medians = {name: statistics.median(values) * 1_000 for name, values in samples.items()}
        gain = medians["together_ms"] / medians["lanes_ms"]
        figures[rows] = {name: round(value, 2) for name, value in medians.items()} | {"gain": round(gain, 3)}
    return figures


def _measure(lanes: FusedLanes, tokens: Tokens, samples: dict[str, list[float]]) -> None:
    import torch  # noqa: PLC0415 - after the environment is prepared

    def step(name: str) -> torch.Tensor:
        began_s, used_s = time.perf_counter(), time.process_time()
        pieces = (
            [lanes.together(tokens)] if name == "together" else lanes.in_lanes(tokens, len(tokens.ids) // 2)
        )
        samples.setdefault(f"{name}_ms", []).append(time.perf_counter() - began_s)
        samples.setdefault(f"{name}_processor_ms", []).append(time.process_time() - used_s)
        return torch.cat(pieces)

    with torch.inference_mode():
        last = {name: [step(name) for _ in range(STEPS)][-1] for name in random.sample(_WAYS, len(_WAYS))}
    if not torch.equal(last["together"], last["lanes"]):
        raise RuntimeError("The two ways do not give the same bits.")


def _ids(count: int) -> list[int]:
    return [TOKEN_FIRST + random.randrange(TOKEN_SPAN) for _ in range(count)]  # noqa: S311 - no secrets


def _tokens(rows: int) -> Tokens:
    from services.worker.adapters.fused_lanes import Tokens  # noqa: PLC0415 - it imports torch

    return Tokens(_ids(rows), range(rows), [PROMPT] * rows, range(rows))


def _load(model: Path, threads: int, rows: int) -> FusedLanes:
    import torch  # noqa: PLC0415 - after the environment is prepared

    from bench.race.own_engine import MODES, Machine, load  # noqa: PLC0415 - it imports torch
    from services.worker.adapters.fused_lanes import Tokens  # noqa: PLC0415 - it imports torch
    from services.worker.adapters.fused_runner import FusedRunner  # noqa: PLC0415 - it imports torch

    runner: Any = load(model, MODES["int8"], Machine("cpu", threads, 2 * rows, 1 << 30))
    if not isinstance(runner, FusedRunner):
        raise SystemExit("bench lanes: this model has no int8 forward of its own.")
    with torch.inference_mode():
        runner._cache.ensure(rows, 2 * PROMPT)  # noqa: SLF001 - there is no other way to its passes
        lanes = runner._passes  # noqa: SLF001 - as above
        for row in range(rows):
            lanes.together(Tokens(_ids(PROMPT), [row] * PROMPT, range(PROMPT), []))
    return lanes


@contextmanager
def _busy(share: float) -> Iterator[None]:
    if not share:
        yield
        return
    rest_s = _BURST_S * (1 / share - 1)
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(_BURST_S), str(rest_s)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="interlock bench lanes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="directory of a model of the Llama family")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 16, 8], metavar="N", help="(32 16 8)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="(%(default)s)")
    parser.add_argument("--busy", type=float, default=0.0, metavar="SHARE", help="of a core, below 1 (none)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="2 or 3 (all cores)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.busy < 1:
        parser.error("--busy is a share of one core: from 0 to below 1")
    if any(rows < 2 for rows in arguments.rows):
        parser.error("--rows are 2 or more: half of them go in each lane")
    return arguments


if __name__ == "__main__":
    main()
