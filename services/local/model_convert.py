"""Turns a GGUF file into a model directory. Owns: the conversion, in a process of its own.

Run as `python -m services.local.model_convert DIRECTORY FILE OUT`. It needs a gigabyte and takes torch and
transformers; both are gone with the process.
"""

from __future__ import annotations

import sys


def main(directory: str, file: str, out: str) -> None:
    """Reads `directory/file` and writes safetensors, configuration and tokenizer to `out`."""
    import torch  # noqa: PLC0415 - heavy, and wanted here alone
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

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
