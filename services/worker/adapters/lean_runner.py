"""The lean runner. Owns: the forward passes of a lean decoder over its cache, and their threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from services.worker.adapters.lean_cache import CacheShape, LeanCache, Place
from services.worker.adapters.lean_decoder import LeanDecoder, Threads
from services.worker.adapters.torch_cache import GROWTH_TOKENS
from services.worker.adapters.torch_runner import DecoderModel, TorchRunner
from services.worker.core.revision import ModelFacts

# Up to so many rows attention runs on one thread: it takes ten microseconds, and a second thread costs as
# much to wake, far more when other processes use the cores. The products wait for memory, and two threads
# wait less: one row took 12.9 ms with one thread, 11.4 ms with two, 10.9 ms with this, on two busy cores.
ONE_THREAD_ROWS = 2


class LeanRunner(TorchRunner):
    """Runs one revision of the Llama family that has plain weights."""

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
        super().settle(facts)
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
        self._decoder = replace(self._decoder, layers=())
        self._lean_cache = LeanCache(self._lean_cache.shape, 0)
        super().close()

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
            states = self._states(ids, place)
            return self._decoder.logits(states[-1:] if len(rows) == 1 and not every else states)

    def _states(self, ids: Sequence[int], place: Place) -> torch.Tensor:
        threads = self._model.threads if self._model.device.type == "cpu" else 1
        attention_threads = 1 if len(ids) <= ONE_THREAD_ROWS else threads
        return self._decoder.forward(ids, self._lean_cache, place, Threads(threads, attention_threads))
