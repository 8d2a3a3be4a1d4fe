"""Measures the engine on one model: tokens per second by batch size, as JSON lines.

    python -m bench.engine MODEL_DIRECTORY [--quantization int8] [--batches 1 4 8 16 32]

Each line holds what was measured in this run, the best of its repetitions; nothing is fixed in advance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.worker.adapters import library_environment
from services.worker.core.ports import ModelRunner
from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import SequenceKey, SequenceStart
from services.worker.core.warmup import warm

# Far from special tokens, and inside every vocabulary in use.
TOKEN_FIRST = 100
TOKEN_SPAN = 4_000


@dataclass(frozen=True, slots=True)
class Work:
    """What one measurement does: `batch` prompts of `prompt_tokens`, each answered with `new_tokens`."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one repetition took.

    Attributes:
        tokens_per_s: New tokens over the whole time.
        decode_tokens_per_s: New tokens of steps without prefill over their time.
        ttft_s: Time to the first token of each sequence.
        step_s: Durations of the steps without prefill: the inter-token latency.
    """

    tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: tuple[float, ...]
    step_s: tuple[float, ...]


def main() -> None:
    """Loads the model once and measures every batch size."""
    arguments = _parse()
    runner, load_s = _load(arguments)
    facts = runner.facts
    print(json.dumps({"load_s": round(load_s, 2), "weights_bytes": facts.weights_bytes}))
    for batch in arguments.batches:
        work = Work(batch, arguments.prompt_tokens, arguments.new_tokens)
        runs = [measure(runner, work) for _ in range(arguments.repeat)]
        print(json.dumps({"batch": batch, **_row(runs)}), flush=True)


def measure(runner: ModelRunner, work: Work) -> Measurement:
    """Runs the work once."""
    limits = Limits(work.batch, runner.facts.kv_tokens)
    scheduler = Scheduler(limits, end_ids=frozenset())
    for number in range(work.batch):
        scheduler.admit(_start(number, work))
    tokens, decoded, decode_s = 0, 0, 0.0
    first: dict[SequenceKey, float] = {}
    steps: list[float] = []
    began = before = time.perf_counter()
    while (batch := scheduler.schedule()) is not None:
        outputs = scheduler.apply(runner.step(batch))
        now = time.perf_counter()
        tokens += len(outputs)
        for output in outputs:
            first.setdefault(output.key, now - began)
        if not batch.chunks:
            decoded += len(outputs)
            decode_s += now - before
            steps.append(now - before)
        before = now
    return Measurement(tokens / (before - began), decoded / decode_s, tuple(first.values()), tuple(steps))


def _row(runs: Sequence[Measurement]) -> dict[str, float]:
    best = max(runs, key=lambda run: run.decode_tokens_per_s)
    quantiles = statistics.quantiles(best.step_s, n=20)
    return {
        "tokens_per_s": round(best.tokens_per_s, 1),
        "decode_tokens_per_s": round(best.decode_tokens_per_s, 1),
        "ttft_p50_ms": round(statistics.median(best.ttft_s) * 1000, 1),
        "itl_p50_ms": round(quantiles[9] * 1000, 1),
        "itl_p95_ms": round(quantiles[18] * 1000, 1),
        "decode_tokens_per_s_median": round(statistics.median(run.decode_tokens_per_s for run in runs), 1),
    }


def _start(number: int, work: Work) -> SequenceStart:
    ids = tuple(TOKEN_FIRST + (31 * number + 17 * place) % TOKEN_SPAN for place in range(work.prompt_tokens))
    return SequenceStart(SequenceKey(1, str(number)), ids, work.new_tokens, credit_tokens=work.new_tokens)


def _load(arguments: argparse.Namespace) -> tuple[ModelRunner, float]:
    # As in the worker: the libraries read their environment when they are imported.
    library_environment.prepare()
    from services.worker.adapters import torch_compute  # noqa: PLC0415 - see above
    from services.worker.adapters.torch_loader import TorchLoader, TorchSettings  # noqa: PLC0415 - as above

    device = torch_compute.choose_device(arguments.device)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    loader = TorchLoader(TorchSettings(device, threads, max(arguments.batches), lambda: arguments.kv_bytes))
    directory: Path = arguments.model
    files = tuple(RevisionFile(path.name, path.stat().st_size, "") for path in directory.iterdir())
    quantization, dtype = Quantization(arguments.quantization), ComputeDtype(arguments.dtype)
    spec = RevisionSpec("bench", "bench", files, quantization, dtype)
    began = time.perf_counter()
    loader.verify(directory, spec)
    runner = loader.load(directory, spec)
    warm(runner)
    return runner, time.perf_counter() - began


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a model in Hugging Face format")
    parser.add_argument("--quantization", choices=[one.value for one in Quantization], default="none")
    parser.add_argument("--dtype", choices=[one.value for one in ComputeDtype], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=42)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kv-bytes", type=int, default=2 << 30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
