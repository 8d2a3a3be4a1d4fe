"""Measures what prompts cost: a chat's second turn, streams beside a prefill, and mixed lengths; one JSON.

    python -m bench.prefill MODEL_DIRECTORY [--quantization int8] [--repeat 5]

The ways that are compared take turns within every repetition, so that whatever else the machine does meets
them alike. Figures are medians over the repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from services.worker.adapters import library_environment
from services.worker.core.ports import ModelRunner
from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Output, SequenceKey, SequenceStart
from services.worker.core.warmup import warm

# Far from special tokens, and inside every vocabulary in use.
TOKEN_FIRST = 100
TOKEN_SPAN = 4_000

STREAMS = 8
SHORT_TOKENS = 42

# Steps before anything is measured: the pace of prefill needs a few to know the machine.
SETTLING_STEPS = 8

# Steps without prefill on either side of one: a machine that slows down meanwhile is seen in both.
WITHOUT_STEPS = 60


class Bench:
    """A scheduler over a runner, stepped by hand, with the time that each step took."""

    def __init__(self, runner: ModelRunner, arguments: argparse.Namespace, *, share: float = 0.5) -> None:
        area = runner.facts.kv_tokens
        chunks = (arguments.chunk_tokens, arguments.shared_chunk_tokens)
        self._runner = runner
        self._scheduler = Scheduler(Limits(2 * STREAMS, area, *chunks, int(area * share)), frozenset())
        self._jobs = 0

    def admit(self, prompt: Sequence[int], tokens: int) -> SequenceKey:
        """Begins a sequence."""
        self._jobs += 1
        key = SequenceKey(1, str(self._jobs))
        self._scheduler.admit(SequenceStart(key, tuple(prompt), tokens, credit_tokens=tokens))
        return key

    def step(self) -> tuple[float, tuple[Output, ...]]:
        """One step: its duration in seconds, and what it yielded."""
        began = time.perf_counter()
        batch = self._scheduler.schedule()
        assert batch is not None
        outputs = self._scheduler.apply(self._runner.step(batch))
        took_s = time.perf_counter() - began
        self._scheduler.pace(batch, took_s)
        return took_s, outputs

    def run_until(self, key: SequenceKey, *, finish: bool = False) -> tuple[list[float], list[int]]:
        """Steps until a sequence's first token or its end; returns the durations and its tokens."""
        durations: list[float] = []
        tokens: list[int] = []
        while True:
            took_s, outputs = self.step()
            durations.append(took_s)
            mine = [output for output in outputs if output.key == key]
            tokens.extend(token for output in mine for token in output.token_ids)
            if mine and (not finish or mine[-1].finish):
                return durations, tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the model once and measures everything."""
    arguments = _parse(argv)
    runner = _load(arguments)
    _second_turn(runner, arguments, share=0.5)
    turns: dict[float, list[float]] = {0.0: [], 0.5: []}
    prefills: list[dict[str, float]] = []
    mixtures: dict[str, list[float]] = {}
    for _ in range(arguments.repeat):
        for share, ttfts_s in turns.items():
            ttfts_s.append(_second_turn(runner, arguments, share=share))
        prefills.append(_beside_prefill(runner, arguments))
        for name, step_s in _mixed_lengths(runner, arguments).items():
            mixtures.setdefault(name, []).append(step_s)
    without_s, with_s = (statistics.median(turns[share]) for share in (0.0, 0.5))
    result = {
        "second_turn": {
            "tokens": arguments.chat_tokens,
            "ttft_without_ms": _ms(without_s),
            "ttft_with_ms": _ms(with_s),
            "times_lower": round(without_s / with_s, 1),
        },
        "beside_prefill": {
            "streams": STREAMS,
            "prompt_tokens": arguments.prompt_tokens,
            **{name: round(statistics.median(one[name] for one in prefills), 2) for name in prefills[0]},
        },
        "mixed_lengths_step_ms": {name: _ms(statistics.median(found)) for name, found in mixtures.items()},
    }
    print(json.dumps(result, indent=2))


def _second_turn(runner: ModelRunner, arguments: argparse.Namespace, *, share: float) -> float:
    """The time to the first token of a chat's second turn, in seconds."""
    bench = Bench(runner, arguments, share=share)
    prompt = _prompt(1, arguments.chat_tokens - 32)
    _, answer = bench.run_until(bench.admit(prompt, 32), finish=True)
    durations, _ = bench.run_until(bench.admit([*prompt, *answer, *_prompt(2, 20)], 4))
    return sum(durations)


def _beside_prefill(runner: ModelRunner, arguments: argparse.Namespace) -> dict[str, float]:
    """The pace of running streams while a long prompt is prefilled, and without: before it and after it."""
    bench = Bench(runner, arguments)
    for number in range(STREAMS):
        bench.admit(_prompt(10 + number, SHORT_TOKENS), 1_000)
    for _ in range(SETTLING_STEPS):
        bench.step()
    without = [bench.step()[0] for _ in range(WITHOUT_STEPS)]
    prompt = bench.admit(_prompt(99, arguments.prompt_tokens), 1)
    beside, _ = bench.run_until(prompt)
    without += [bench.step()[0] for _ in range(WITHOUT_STEPS)]
    return {
        "itl_p95_without_ms": _ms(_p95(without)),
        "itl_p95_beside_ms": _ms(_p95(beside)),
        "itl_p95_ratio": _p95(beside) / _p95(without),
        "itl_p50_without_ms": _ms(statistics.median(without)),
        "itl_p50_beside_ms": _ms(statistics.median(beside)),
        "ttft_of_the_prompt_ms": _ms(sum(beside)),
    }


def _mixed_lengths(runner: ModelRunner, arguments: argparse.Namespace) -> dict[str, float]:
    """The median decode step of eight streams in seconds: all short, one long, all long."""
    found: dict[str, float] = {}
    for name, long_ones in (("all_short", 0), ("one_long", 1), ("all_long", STREAMS)):
        bench = Bench(runner, arguments)
        for number in range(STREAMS):
            # The long ones begin alike: their prefill is not what is measured.
            ids = (
                _prompt(99, arguments.prompt_tokens) if number < long_ones else _prompt(number, SHORT_TOKENS)
            )
            # Longer than the prefill beside them takes: none ends before all decode.
            bench.admit([*ids, TOKEN_FIRST + number], 1_000)
        while len(bench.step()[1]) < STREAMS:
            pass
        found[name] = statistics.median(bench.step()[0] for _ in range(20))
    return found


def _prompt(seed: int, tokens: int) -> list[int]:
    return [TOKEN_FIRST + (977 * seed + 17 * place + place * place) % TOKEN_SPAN for place in range(tokens)]


def _p95(durations: Sequence[float]) -> float:
    return statistics.quantiles(durations, n=20)[18]


def _ms(seconds: float) -> float:
    return round(seconds * 1_000, 1)


def _load(arguments: argparse.Namespace) -> ModelRunner:
    # As in the worker: the libraries read their environment when they are imported.
    threads = library_environment.prepare(arguments.threads)
    from services.worker.adapters import torch_compute  # noqa: PLC0415 - see above
    from services.worker.adapters.torch_loader import TorchLoader, TorchSettings  # noqa: PLC0415 - as above

    device = torch_compute.choose_device(arguments.device)
    loader = TorchLoader(TorchSettings(device, threads, 2 * STREAMS, lambda: arguments.kv_bytes))
    directory: Path = arguments.model
    files = tuple(RevisionFile(path.name, path.stat().st_size, "") for path in directory.iterdir())
    quantization, dtype = Quantization(arguments.quantization), ComputeDtype(arguments.dtype)
    spec = RevisionSpec("bench", "bench", files, quantization, dtype)
    loader.verify(directory, spec)
    runner = loader.load(directory, spec)
    warm(runner)
    return runner


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="interlock bench prefill", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a model in Hugging Face format")
    parser.add_argument("--quantization", choices=[one.value for one in Quantization], default="none")
    parser.add_argument("--dtype", choices=[one.value for one in ComputeDtype], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--chat-tokens", type=int, default=1_000)
    parser.add_argument("--prompt-tokens", type=int, default=2_000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--shared-chunk-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kv-bytes", type=int, default=2 << 30)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
