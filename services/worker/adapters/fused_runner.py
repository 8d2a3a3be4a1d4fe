"""The fused runner. Owns: the steps of a fused decoder over its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from services.worker.adapters.fused_attention import BLOCK_POSITIONS
from services.worker.adapters.fused_decoder import FusedDecoder
from services.worker.adapters.fused_lanes import FusedLanes, Tokens
from services.worker.adapters.lean_cache import CacheShape, LeanRows
from services.worker.adapters.torch_cache import GROWTH_TOKENS
from services.worker.adapters.torch_runner import DecoderModel, TorchRunner
from services.worker.core.batch import Batch, Decode
from services.worker.core.revision import ModelFacts

# Four rows take hardly longer than one: that is as long as it takes to read the weights.
GUESS_TOKENS = 3


class FusedRunner(TorchRunner):
    """Runs one revision of the Llama family in LLM.int8 on the processor."""

    def __init__(self, model: DecoderModel, decoder: FusedDecoder) -> None:
        super().__init__(model)
        self._decoder = decoder
        heads = decoder.heads
        shape = CacheShape(
            len(decoder.layers), heads.shared, heads.dim, torch.float16, model.device, BLOCK_POSITIONS
        )
        # The first passes, which measure, need little.
        rows = LeanRows(shape, 2 * GROWTH_TOKENS)
        self._cache = rows
        self._passes = FusedLanes(decoder, rows, model.threads)

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights, and of what passes keep beside them."""
        return self._decoder.bytes + self._passes.bytes

    def settle(self, facts: ModelFacts) -> None:
        """As for any runner; the module, which the probe has been compared with, is given up."""
        super().settle(replace(facts, guess_tokens=GUESS_TOKENS))
        self._model = replace(self._model, module=None)

    def close(self) -> None:
        """See `ModelRunner.close`."""
        super().close()
        self._passes.give_up()
        self._decoder = replace(self._decoder, layers=())

    def forward(self, batch: Batch) -> tuple[list[torch.Tensor], list[int]]:
        """All chunks and all decodes at once: no token's numbers depend on its neighbours."""
        if batch.decodes and batch.decodes[0].guess:
            return self._check_guess(batch.decodes[0])
        ids: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        drawn: list[int] = []
        for chunk in batch.chunks:
            count = len(chunk.token_ids)
            ids.extend(chunk.token_ids)
            rows.extend([chunk.row] * count)
            positions.extend(range(chunk.position, chunk.position + count))
            if chunk.draw:
                drawn.append(len(ids) - 1)
        for decode in batch.decodes:
            drawn.append(len(ids))
            ids.append(decode.token_id)
            rows.append(decode.row)
            positions.append(decode.position)
        if not ids:
            return [], []
        logits = self._passes.forward(Tokens(ids, rows, positions, drawn))
        return (logits if drawn else []), [rows[index] for index in drawn]

    def _check_guess(self, one: Decode) -> tuple[list[torch.Tensor], list[int]]:
        """One token and what is guessed behind it, as if they were a prompt: each yields its logits."""
        ids = (one.token_id, *one.guess)
        return [self._pass([one.row], [one.position], [ids], every=True)], [one.row] * len(ids)

    def _pass(
        self,
        rows: list[int],
        positions: list[int],
        token_ids: Sequence[tuple[int, ...]],
        *,
        every: bool = False,
    ) -> torch.Tensor:
        count = len(token_ids[0])
        ids = [token_id for row in token_ids for token_id in row]
        spread = [row for row in rows for _ in range(count)]
        places = [position + offset for position in positions for offset in range(count)]
        drawn = range(len(ids)) if every or count == 1 else [len(ids) - 1]
        return self._passes.together(Tokens(ids, spread, places, drawn))
