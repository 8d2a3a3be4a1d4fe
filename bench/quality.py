"""Measures what quantization costs: perplexity of an English text, by quantization, as JSON lines.

    python -m bench.quality MODEL_DIRECTORY [--modes fp32 bf16 int8 int8-bitsandbytes nf4 fp4]

The text is the language reference that Python carries for its own help (`pydoc_data.topics`), cut into
windows that are scored each by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

from services.worker.adapters import library_environment
from services.worker.core.revision import ComputeDtype, Quantization, RevisionFile, RevisionSpec

# Quantization, compute format, and whether the lean forward may run it.
MODES = {
    "fp32": (Quantization.NONE, ComputeDtype.FP32, True),
    "bf16": (Quantization.NONE, ComputeDtype.BF16, True),
    "int8": (Quantization.INT8, ComputeDtype.AUTO, True),
    "int8-bitsandbytes": (Quantization.INT8, ComputeDtype.AUTO, False),
    "nf4": (Quantization.NF4, ComputeDtype.AUTO, False),
    "fp4": (Quantization.FP4, ComputeDtype.AUTO, False),
}

BAR_WIDTH = 30


def main() -> None:
    """Loads the model once for each mode and scores the same text."""
    arguments = _parse()
    # As in the worker: the libraries read their environment when they are imported.
    library_environment.prepare()
    windows = _windows(arguments)
    for mode in arguments.modes:
        runner, began = _load(arguments, mode), time.perf_counter()
        perplexity = _perplexity(runner, windows, mode)
        row = {
            "mode": mode,
            "perplexity": round(perplexity, 3),
            "tokens": sum(len(window) for window in windows),
            "seconds": round(time.perf_counter() - began, 1),
            "weights_bytes": runner.facts.weights_bytes,
        }
        print(json.dumps(row), flush=True)
        runner.close()


def _perplexity(runner: Any, windows: list[tuple[int, ...]], mode: str) -> float:
    import torch  # noqa: PLC0415 - see main

    total, scored = 0.0, 0
    with torch.inference_mode():
        for window in _progress(windows, mode):
            logits = runner.score(window)[:-1].float()
            wanted = torch.tensor(window[1:], device=logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            scored += len(window) - 1
    return math.exp(total / scored)


def _progress(windows: list[tuple[int, ...]], mode: str) -> Iterator[tuple[int, ...]]:
    for done, window in enumerate(windows, 1):
        yield window
        if sys.stderr.isatty():
            bar = "#" * (BAR_WIDTH * done // len(windows))
            end = "\n" if done == len(windows) else ""
            print(f"\r{mode:>18} [{bar:<{BAR_WIDTH}}] {done}/{len(windows)}", end=end, file=sys.stderr)


def _windows(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    from tokenizers import Tokenizer  # noqa: PLC0415 - see main

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    # Four characters to a token, and some to spare.
    ids = (
        Tokenizer.from_file(str(arguments.model / "tokenizer.json")).encode(text[: 6 * arguments.tokens]).ids
    )
    ids = ids[: arguments.tokens]
    size = arguments.window
    return [tuple(ids[first : first + size]) for first in range(0, len(ids) - size + 1, size)]


def _load(arguments: argparse.Namespace, mode: str) -> Any:
    from services.worker.adapters import torch_compute  # noqa: PLC0415 - see main
    from services.worker.adapters.torch_loader import TorchLoader, TorchSettings  # noqa: PLC0415 - as above

    quantization, dtype, lean = MODES[mode]
    directory: Path = arguments.model
    files = tuple(RevisionFile(path.name, path.stat().st_size, "") for path in directory.iterdir())
    threads = arguments.threads or len(os.sched_getaffinity(0))
    device = torch_compute.choose_device(arguments.device)
    loader = TorchLoader(TorchSettings(device, threads, 1, lambda: 1 << 30, lean))
    return loader.load(directory, RevisionSpec("bench", "bench", files, quantization, dtype))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a model in Hugging Face format")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--window", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
