"""Turns a GGUF file into a model directory. Owns: the conversion, in a process of its own.

Run as `python -m services.local.model_convert DIRECTORY FILE OUT`. It needs a gigabyte and takes torch and
transformers; both are gone with the process.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def main(directory: str, file: str, out: str) -> None:
    """Reads `directory/file` and writes safetensors, configuration and tokenizer to `out`."""
    import gguf  # noqa: PLC0415 - heavy, and wanted here alone
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    # The library asks anew for the configuration, the weights and the tokenizer, and for each module: half of
    # a conversion would go by with reading the same strings again.
    once: Any = gguf
    once.GGUFReader = functools.cache(gguf.GGUFReader)
    once.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file, local_files_only=True)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
