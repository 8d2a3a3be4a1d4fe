"""Measures a worker's cold start by phase, and the memory that workers of one revision share.

    python -m bench.startup MODEL_DIRECTORY [--quantization int8 none] [--repeat 3] [--json FILE]

Every start is a process of its own. First and later starts and the library's plain `from_pretrained` take
turns; figures are medians. The files are in the page cache in all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.common import artifacts
from services.worker.adapters import library_environment
from services.worker.core.revision import (
    ComputeDtype,
    LoadStage,
    Quantization,
    RevisionFile,
    RevisionSpec,
)
from services.worker.core.warmup import warm

# Of memory that is shared, four is the number that the promise names.
WORKERS = 4

# A first start in four bits takes half a minute on two cores.
START_TIMEOUT_S = 300

FORMS_BYTES = 1 << 40
KV_BYTES = 64 << 20


class Stopwatch:
    """Durations by name, of what comes one after another."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}
        self._name = ""
        self._began_s = 0.0

    def turn_to(self, name: str) -> None:
        """Ends what is measured, and measures this from now on; empty: nothing."""
        now_s = time.perf_counter()
        if self._name:
            passed_s = now_s - self._began_s
            self.durations_s[self._name] = self.durations_s.get(self._name, 0.0) + passed_s
        self._name, self._began_s = name, now_s


def main(argv: Sequence[str] | None = None) -> None:
    """Measures everything, prints a table, and writes JSON where a file is named."""
    arguments = _parse(argv)
    if arguments.child:
        _child(arguments)
        return
    described = json.dumps([asdict(file) for file in artifacts.describe(arguments.model)])
    results: dict[str, Any] = {}
    for quantization in arguments.quantization:
        with tempfile.TemporaryDirectory() as place:
            starts = _starts(arguments, quantization, described, Path(place))
            memory = _memory(arguments, quantization, described, Path(place) / "forms-0")
        results[quantization] = {"starts_s": starts, "memory_mb": memory}
        _print(quantization, starts, memory)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _starts(
    arguments: argparse.Namespace, quantization: str, described: str, place: Path
) -> dict[str, dict[str, float]]:
    """Median durations of each phase by way of starting."""
    found: dict[str, list[dict[str, float]]] = {"first": [], "later": [], "from_pretrained": []}
    for number in range(arguments.repeat):
        ours = [*_command(arguments, quantization, described), "--forms", str(place / f"forms-{number}")]
        library = [*_command(arguments, quantization, described), "--child", "library"]
        found["first"].append(_run([*ours, "--child", "worker"]))
        found["later"].append(_run([*ours, "--child", "worker"]))
        found["from_pretrained"].append(_run(library))
    return {
        way: {phase: statistics.median(run.get(phase, 0.0) for run in runs) for phase in runs[0]}
        for way, runs in found.items()
    }


def _memory(
    arguments: argparse.Namespace, quantization: str, described: str, forms: Path
) -> dict[str, float]:
    """Proportional memory in MB: of workers with the model less that of as many without, and of a model."""
    ours = [*_command(arguments, quantization, described), "--forms", str(forms), "--hold"]
    model_mb = _run([*ours[:-1], "--child", "worker"])["weights_bytes"] / 1e6
    found = {"model": model_mb}
    for count in (1, WORKERS):
        with_model, without = (_pss_mb([*ours, "--child", child], count) for child in ("worker", "empty"))
        found[f"workers_{count}"] = with_model
        found[f"workers_{count}_without"] = without
        found[f"models_{count}"] = (with_model - without) / model_mb
    return found


def _pss_mb(command: Sequence[str], count: int) -> float:
    """The proportional memory of so many processes together, once all of them are ready."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(_held(command)) for _ in range(count)]
        return sum(_pss_bytes(process.pid) for process in held) / 1e6


@contextlib.contextmanager
def _held(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready, and stays until its input ends."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        if not process.stdout.readline():
            raise RuntimeError("A process that should hold a model has ended.")
        try:
            yield process
        finally:
            process.stdin.close()


def _pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _run(command: Sequence[str]) -> dict[str, float]:
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=START_TIMEOUT_S
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _command(arguments: argparse.Namespace, quantization: str, described: str) -> list[str]:
    settings = ["--quantization", quantization, "--dtype", arguments.dtype, "--files", described]
    return [sys.executable, "-m", "bench.startup", str(arguments.model), *settings]


def _child(arguments: argparse.Namespace) -> None:
    """One start, told as JSON."""
    ways = {"worker": _start_worker, "library": _start_library, "empty": _start_empty}
    print(json.dumps(ways[arguments.child](arguments)), flush=True)
    if arguments.hold:
        sys.stdin.read()


def _start_worker(arguments: argparse.Namespace) -> dict[str, float]:
    watch = Stopwatch()
    loader = _loader(arguments, watch)
    watch.turn_to("fetch")
    files = tuple(artifacts.FileDigest(**file) for file in json.loads(arguments.files))
    spec = RevisionSpec(
        "bench",
        "bench",
        tuple(RevisionFile(file.path, file.size_bytes, file.sha256) for file in files),
        Quantization(arguments.quantization[0]),
        ComputeDtype(arguments.dtype),
    )
    directory = asyncio.run(_fetch(files, arguments.model))
    watch.turn_to("verify")
    loader.verify(directory, spec)
    watch.turn_to("load")

    def turn(stage: LoadStage, _done: int, _total: int) -> None:
        watch.turn_to(f"load: {stage.value}")

    runner = loader.load(directory, spec, turn)
    watch.turn_to("warm")
    warm(runner)
    watch.turn_to("")
    # It has to stay while its memory is measured.
    globals()["_kept"] = runner
    return watch.durations_s | {"weights_bytes": float(runner.facts.weights_bytes)}


def _start_empty(arguments: argparse.Namespace) -> dict[str, float]:
    watch = Stopwatch()
    _loader(arguments, watch)
    watch.turn_to("")
    return watch.durations_s


def _start_library(arguments: argparse.Namespace) -> dict[str, float]:
    """What a plain program does: import, load, and compute one token."""
    watch = Stopwatch()
    watch.turn_to("import")
    cores = library_environment.prepare()
    import torch  # noqa: PLC0415 - its import is measured
    import transformers  # noqa: PLC0415 - as above

    factory: Any = transformers.AutoModelForCausalLM
    torch.set_num_threads(cores)
    watch.turn_to("load")
    module = factory.from_pretrained(arguments.model, dtype="auto")
    watch.turn_to("warm")
    with torch.inference_mode():
        module(torch.tensor([list(range(1, 13))]))
    watch.turn_to("")
    return watch.durations_s


def _loader(arguments: argparse.Namespace, watch: Stopwatch) -> Any:
    watch.turn_to("import")
    threads = library_environment.prepare()
    from services.worker.adapters import torch_compute  # noqa: PLC0415 - its import is measured
    from services.worker.adapters.stored_forms import StoredForms  # noqa: PLC0415 - as above
    from services.worker.adapters.torch_loader import TorchLoader, TorchSettings  # noqa: PLC0415 - as above

    forms = StoredForms(arguments.forms, FORMS_BYTES)
    device = torch_compute.choose_device("cpu")
    return TorchLoader(TorchSettings(device, threads, 8, lambda: KV_BYTES, forms=forms))


async def _fetch(files: tuple[artifacts.FileDigest, ...], directory: Path) -> Path:
    def refuse(path: str, offset: int) -> AsyncIterator[bytes]:
        raise RuntimeError(f"{path} has changed since it was described; {offset} bytes fit.")

    return await artifacts.fetch(
        files,
        local_path=str(directory),
        download=refuse,
        directory=directory,
        on_progress=lambda _done, _total: None,
    )


def _print(quantization: str, starts: dict[str, dict[str, float]], memory: dict[str, float]) -> None:
    phases = [phase for phase in starts["first"] if phase != "weights_bytes"]
    phases += [phase for phase in starts["later"] if phase not in (*phases, "weights_bytes")]
    print(f"| {quantization}, seconds | {' | '.join(starts)} |")
    print(f"|---{'|---' * len(starts)}|")
    for phase in phases:
        print(f"| {phase} | {' | '.join(f'{way.get(phase, 0.0):.2f}' for way in starts.values())} |")
    totals = [sum(way.get(phase, 0.0) for phase in phases) for way in starts.values()]
    print(f"| all | {' | '.join(f'{total:.2f}' for total in totals)} |")
    print(json.dumps({name: round(value, 2) for name, value in memory.items()}), flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a model in Hugging Face format")
    names = [one.value for one in Quantization]
    parser.add_argument("--quantization", nargs="+", choices=names, default=["int8", "none"])
    parser.add_argument("--dtype", choices=[one.value for one in ComputeDtype], default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    for hidden in ("--child", "--files"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--forms", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
