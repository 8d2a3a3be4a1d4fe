"""The counts to which rows are filled up, and what is made before the first request meets them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.worker.core.row_counts import counts, filled
from tests.fakes import tiny_models

# Which programs the library makes it tells on the process's own output.
PROGRAM = """
import ctypes
import sys
from pathlib import Path
import torch
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.core.revision import ComputeDtype, Quantization
from tests.fakes import tiny_models

directory = Path(sys.argv[1])
settings = TorchSettings(torch.device("cpu"), 1, 32, lambda: 1 << 26)
spec = tiny_models.spec_of(directory, Quantization.NONE, ComputeDtype.BF16)
runner = TorchLoader(settings).load(directory, spec)
with torch.backends.mkldnn.verbose(2):
    runner.rehearse()
libc = ctypes.CDLL(None)
libc.fflush(None)
print("-- rehearsed", flush=True)
with torch.inference_mode(), torch.backends.mkldnn.verbose(2):
    for rows in range(1, 161):
        states = torch.randn(rows, runner._decoder.embedding.shape[1]).bfloat16()
        layer = runner._decoder.layers[0]
        layer.qkv(states)
        layer.down(layer.gate_up(states).chunk(2, dim=1)[0].contiguous())
        if rows <= 32:
            runner._decoder.logits(states)
"""


def test_few_counts_hold_all_rows() -> None:
    """None is too small, none holds a quarter too many, and each stands for itself."""
    for rows in range(1, 3_000):
        assert rows <= filled(rows) <= max(rows * 1.25, rows + 1)
        assert filled(filled(rows)) == filled(rows)
    assert counts(512)[:16] == (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 36, 40)
    assert counts(33)[-1] == 36
    assert counts(1) == (1,)
    assert set(counts(640)) == {filled(rows) for rows in range(1, 641)}
    assert len(counts(640)) <= 50
    assert all(one < other for one, other in itertools.pairwise(counts(640)))


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this processor multiplies no bfloat16"
)
def test_after_the_rehearsal_no_step_makes_a_program(tmp_path: Path) -> None:
    """Each shape that serving has was met; there were dozens to make."""
    tiny_models.save("llama", tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, capture_output=True, timeout=50
    ).stdout
    before, _, after = told.partition(b"-- rehearsed")
    assert before.count(b"create:cache_miss") > 50
    assert after.count(b"exec") > 500
    assert after.count(b"create:cache_miss") == 0
