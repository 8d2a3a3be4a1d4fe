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


def probe(model: DecoderModel, runner: TorchRunner, *, vocabulary: int, kind: str, exact: bool) -> None:
    """Passes tokens through the slots and through the bare model, and compares.

    Args:
        model: The bare model.
        runner: The same over slots.
        vocabulary: Token ids are below it.
        kind: The model's type, for the message.
        exact: Whether nothing but rounding in single precision may differ.

    Raises:
        ArtifactInvalid: The logits differ or are not finite.
    """
    ids = tuple((7 * position + 3) % vocabulary for position in range(PROBE_TOKENS))
    with torch.inference_mode():
        slots = _over_slots(runner, ids)
        short = _bare(model, ids[: SHORT_TOKENS + 1])
        bare = torch.cat([_bare(model, ids), short])
    if not bool(torch.isfinite(slots).all() and torch.isfinite(bare).all()):
        raise ArtifactInvalid("The model yields numbers that are not finite; its weights are damaged.")
    error = float((slots - bare).norm() / bare.norm().clamp(min=1e-6))
    if error > (TOLERANCE_EXACT if exact else TOLERANCE_ROUNDED):
        raise ArtifactInvalid(f"Models of type {kind} cannot be served: their answers change over slots.")


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
