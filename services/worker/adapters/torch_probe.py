"""The probe. Owns: the test whether a loaded model gives the same answers over slots as by itself."""

from __future__ import annotations

import torch

from services.common.errors import ArtifactInvalid
from services.worker.adapters.torch_runner import DecoderModel, TorchRunner
from services.worker.core.batch import Batch, Chunk, Decode, Draw
from services.worker.core.sequence import Sampling

# Long enough for two buckets of the cache; the second row is shorter, so that lengths mix.
PROBE_TOKENS = 20
SHORT_TOKENS = 11
CUT = 7

# Relative error of the logits. Rounding stays far below it; a wrong mask or position comes near 1.
# Quantized activations are rounded by row and chunk, and bfloat16 has eight bits: both differ more.
TOLERANCE_EXACT = 1e-2
TOLERANCE_ROUNDED = 0.3


def bare_logits(model: DecoderModel, *, vocabulary: int) -> torch.Tensor:
    """What the bare model says to the probe's tokens, `[2, vocabulary]` in single precision."""
    ids = _tokens(vocabulary)
    with torch.inference_mode():
        return torch.cat([_bare(model, ids), _bare(model, ids[: SHORT_TOKENS + 1])])


def probe(runner: TorchRunner, bare: torch.Tensor, *, kind: str, exact: bool) -> None:
    """Passes tokens through the slots, and compares with what the bare model has said to them.

    Args:
        runner: The model over slots.
        bare: What `bare_logits` has found, now or when the weights were stored.
        kind: The model's type, for the message.
        exact: Whether nothing but rounding in single precision may differ.

    Raises:
        ArtifactInvalid: The logits differ or are not finite.
    """
    with torch.inference_mode():
        slots = _over_slots(runner, _tokens(bare.shape[1])).to(bare.device)
    if not bool(torch.isfinite(slots).all() and torch.isfinite(bare).all()):
        raise ArtifactInvalid("The model yields numbers that are not finite; its weights are damaged.")
    error = float((slots - bare).norm() / bare.norm().clamp(min=1e-6))
    if error > (TOLERANCE_EXACT if exact else TOLERANCE_ROUNDED):
        raise ArtifactInvalid(f"Models of type {kind} cannot be served: their answers change over slots.")


def _tokens(vocabulary: int) -> tuple[int, ...]:
    return tuple((7 * position + 3) % vocabulary for position in range(PROBE_TOKENS))


def _over_slots(runner: TorchRunner, ids: tuple[int, ...]) -> torch.Tensor:
    """Prefill in two chunks beside a shorter row, then both decode together; `[2, vocabulary]`."""
    draw = Draw(Sampling(), 0, 0)
    last = PROBE_TOKENS - 1
    chunks = (
        Chunk(0, 0, ids[:CUT], None),
        Chunk(1, 0, ids[:SHORT_TOKENS], draw),
        Chunk(0, CUT, ids[CUT:last], draw),
    )
    runner.step(Batch(2, 2 * PROBE_TOKENS, (), chunks, ()))
    decodes = (Decode(0, last, ids[last], draw), Decode(1, SHORT_TOKENS, ids[SHORT_TOKENS], draw))
    return runner.decode(decodes).float()


def _bare(model: DecoderModel, ids: tuple[int, ...]) -> torch.Tensor:
    output = model.module(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits
