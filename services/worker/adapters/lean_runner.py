"""The lean runner. Owns: the forward passes of a lean decoder over its cache, and their threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from services.worker.adapters.lean_cache import CacheShape, LeanCache, Place
from services.worker.adapters.lean_decoder import LeanDecoder, Threads
from services.worker.adapters.torch_cache import GROWTH_TOKENS
from services.worker.adapters.torch_runner import DecoderModel, TorchRunner
from services.worker.core.batch import Batch, Decode
from services.worker.core.length_groups import split_by_length
from services.worker.core.revision import ModelFacts

# Up to so many rows attention runs on one thread: it takes ten microseconds, and a second thread costs as
# much to wake, far more when other processes use the cores. The products wait for memory, and two threads
# wait less: one row took 12.9 ms with one thread, 11.4 ms with two, 10.9 ms with this, on two busy cores.
ONE_THREAD_ROWS = 2

# Rows up to four take hardly longer than one where the weights are packed for the processor.
GUESS_TOKENS = 3

# Attention to so many positions takes longer than one more place in a pass. The weights are read once in any
# case, so this is far less than what one more pass costs.
PLACE_POSITIONS = 4_000


class LeanRunner(TorchRunner):
    """Runs one revision of the Llama family."""

    def __init__(self, model: DecoderModel, decoder: LeanDecoder) -> None:
        super().__init__(model)
        self._decoder = decoder
        heads = decoder.heads
        shape = CacheShape(len(decoder.layers), heads.shared, heads.dim, decoder.dtype, model.device)
        # The first passes, which measure, need little.
        self._lean_cache = LeanCache(shape, 2 * GROWTH_TOKENS)
        self._cache = self._lean_cache

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights."""
        return self._decoder.bytes

    def settle(self, facts: ModelFacts) -> None:
        """As for any runner; the module, which the probe has been compared with, is given up."""
        super().settle(replace(facts, guess_tokens=GUESS_TOKENS if self._decoder.guesses else 0))
        self._model = replace(self._model, module=None)

    def rehearse(self) -> None:
        """See `ModelRunner.rehearse`."""
        # On a GPU programs do not depend on the number of rows, nor does their library forget any.
        if self._model.device.type == "cpu":
            torch.set_num_threads(self._model.threads)
            with torch.inference_mode():
                self._decoder.rehearse()

    def close(self) -> None:
        """See `ModelRunner.close`."""
        super().close()
        self._decoder = replace(self._decoder, layers=())
        self._lean_cache = LeanCache(self._lean_cache.shape, 0)

    def forward(self, batch: Batch) -> tuple[list[torch.Tensor], list[int]]:
        """All chunks and all decodes in one pass, where no token's numbers depend on its neighbours."""
        if not self._decoder.joins:
            return super().forward(batch)
        if batch.decodes and batch.decodes[0].guess:
            return self._check_guess(batch.decodes[0])
        groups = split_by_length(batch.decodes, PLACE_POSITIONS) if batch.decodes else ()
        ids: list[int] = []
        places: list[Place] = []
        ends: dict[int, int] = {}
        for chunk in batch.chunks:
            places.append(self._lean_cache.look([chunk.row], [chunk.position], len(chunk.token_ids)))
            ids.extend(chunk.token_ids)
            ends[chunk.row] = len(ids) - 1
        for group in groups:
            rows = [decode.row for decode in group]
            places.append(self._lean_cache.look(rows, [decode.position for decode in group], 1))
            ends.update(zip(rows, range(len(ids), len(ids) + len(rows)), strict=True))
            ids.extend(decode.token_id for decode in group)
        drawn = [chunk.row for chunk in batch.chunks if chunk.draw] + [one.row for one in batch.decodes]
        states = self._states(ids, places) if ids else torch.empty(0)
        if not drawn:
            return [], []
        wanted = torch.tensor([ends[row] for row in drawn], device=states.device)
        return [self._decoder.logits(states.index_select(0, wanted))], drawn

    def _check_guess(self, one: Decode) -> tuple[list[torch.Tensor], list[int]]:
        """One token and what is guessed behind it, as if they were a prompt: each yields its logits."""
        ids = [one.token_id, *one.guess]
        states = self._states(ids, [self._lean_cache.look([one.row], [one.position], len(ids))])
        return [self._decoder.logits(states)], [one.row] * len(ids)

    def _pass(
        self,
        rows: list[int],
        positions: list[int],
        token_ids: Sequence[tuple[int, ...]],
        *,
        every: bool = False,
    ) -> torch.Tensor:
        ids = [token_id for row in token_ids for token_id in row]
        place = self._lean_cache.look(rows, positions, len(token_ids[0]))
        with self._kernels(len(ids)):
            states = self._states(ids, [place])
            return self._decoder.logits(states[-1:] if len(rows) == 1 and not every else states)

    def _states(self, ids: Sequence[int], places: Sequence[Place]) -> torch.Tensor:
        threads = self._model.threads if self._model.device.type == "cpu" else 1
        attention_threads = 1 if len(ids) <= ONE_THREAD_ROWS else threads
        return self._decoder.forward(ids, self._lean_cache, places, Threads(threads, attention_threads))
