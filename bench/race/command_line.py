"""Options that benches of a model share. Owns: their names and defaults."""

from __future__ import annotations

import argparse
import os
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
    group.add_argument("--threads", type=int, default=0, help="0: all cores")
    group.add_argument("--kv-bytes", type=int, default=2 << 30, help="budget of the KV cache")


def _model(text: str) -> Path:
    directory = Path(text)
    if not (directory / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} holds no model; name a directory with config.json, "
            "or fetch the demo model with `interlock models fetch`"
        )
    return directory
