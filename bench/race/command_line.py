"""Options that benches of a model share. Owns: their names and defaults."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

DEMO_MODEL = "smollm2-135m-instruct"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model's directory; left out, it is the demo model that `interlock up` has fetched."""
    fetched = Path(os.environ.get("INTERLOCK_HOME", ".interlock")) / "models" / DEMO_MODEL
    parser.add_argument(
        "model",
        type=_model,
        nargs="?",
        default=str(fetched),
        help="directory of a model in Hugging Face format (default: %(default)s)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Adds what the model may use of the machine."""
    group = parser.add_argument_group("on what")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    # Counted before a model is loaded: it may bind this thread to one core.
    cores = len(os.sched_getaffinity(0))
    group.add_argument("--threads", type=int, default=cores, help="of a forward pass (default: %(default)s)")
    group.add_argument("--kv-bytes", type=int, default=2 << 30, help="budget of the KV cache")


def as_told(module: str, argv: Sequence[str]) -> str:
    """The command as a report repeats it: files by their names, for where they lay says nothing to others."""
    words = [Path(word).name if os.sep in word else word for word in argv]
    return shlex.join(["python", "-m", module, *words])


def _model(text: str) -> Path:
    directory = Path(text)
    if not (directory / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} holds no model; name a directory with config.json, "
            "or fetch the demo model with `interlock models fetch`"
        )
    return directory
