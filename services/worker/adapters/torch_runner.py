"""The runner. Owns: the forward passes of one loaded model over its slot cache.

Performs what a batch says and decides nothing. Prefill takes one row at a time, so that a sequence's
numbers do not depend on who else begins; decode takes all rows together. A runner whose numbers never
depend on that may join them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.worker.adapters.torch_cache import RowCache, SlotCache
from services.worker.adapters.torch_memory import shortage_named
from services.worker.adapters.torch_sampler import sample
from services.worker.core.batch import Batch, Choice, Chunk, Decode
from services.worker.core.kv_budget import bucketed
from services.worker.core.length_groups import split_by_length
from services.worker.core.revision import ModelFacts
from services.worker.core.scheduler import NO_TOKEN

FULL = "full_attention"
SLIDING = "sliding_attention"

# On CPU the attention to so many positions takes longer than one more pass over the weights, whatever their
# format: measured, it is about 7,000 in bfloat16 and 16,000 in int8.
PASS_POSITIONS = 16_000


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A Hugging Face decoder and how it is called.

    Attributes:
        module: The module, in evaluation mode.
        layers: Layers that have keys and values.
        attention: The kinds of attention in it: FULL, SLIDING or both.
        window: Positions that sliding attention sees; 0 where there is none.
        device: Where it computes.
        dtype: Of activations and masks, and of the KV cache but for fused models.
        threads: CPU threads of a forward pass.
    """

    module: Any
    layers: int
    attention: frozenset[str]
    window: int
    device: torch.device
    dtype: torch.dtype
    threads: int


class TorchRunner:
    """Runs one revision.

    Args:
        model: The model.
        pass_positions: Decodes are passed in two groups when that saves attention to more positions.
    """

    def __init__(self, model: DecoderModel, *, pass_positions: int = PASS_POSITIONS) -> None:
        self._model = model
        self._pass_positions = pass_positions
        self._slots = SlotCache(model.layers, model.device)
        self._cache: RowCache = self._slots
        self._facts = ModelFacts(0, 0, frozenset(), 0, 0)

    @property
    def facts(self) -> ModelFacts:
        """See `ModelRunner.facts`."""
        return self._facts

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one position of one row; known after the first pass."""
        return self._cache.bytes_per_token

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights."""
        return int(self._model.module.get_memory_footprint())

    def settle(self, facts: ModelFacts) -> None:
        """Takes in what was found out while loading; from now on the cache may grow to its budget."""
        self._facts = facts
        self._cache.area_tokens = facts.kv_tokens

    def step(self, batch: Batch) -> Sequence[Choice]:
        """See `ModelRunner.step`."""
        # The setting belongs to a thread, and steps may come from any one.
        if self._model.device.type == "cpu" and torch.get_num_threads() != self._model.threads:
            torch.set_num_threads(self._model.threads)
        with shortage_named(), torch.inference_mode():
            if batch.rows > self._cache.rows:
                self._cache.ensure(batch.rows, batch.capacity)
            for move in batch.moves:
                self._cache.move(move.source, move.target, move.tokens)
            self._cache.ensure(batch.rows, batch.capacity)
            logits, rows = self.forward(batch)
            choices = sample(torch.cat(logits), batch.draws) if logits else []
            for row, choice in zip(rows, choices, strict=True):
                if choice.token_id == NO_TOKEN:
                    self._cache.clear(row)
            return choices

    def rehearse(self) -> None:
        """See `ModelRunner.rehearse`: a model of the library has nothing that comes apart so."""

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._slots.give_up()
        self._cache = self._slots = SlotCache(0, self._model.device)
        self._model = DecoderModel(
            None, 0, frozenset(), 0, self._model.device, self._model.dtype, self._model.threads
        )
        if self._model.device.type == "cuda":
            # Else torch keeps the memory, for itself alone.
            torch.cuda.empty_cache()

    def prefill(self, chunk: Chunk) -> torch.Tensor:
        """Passes several tokens of one row; returns the last one's logits, `[1, vocabulary]`."""
        return self._pass([chunk.row], [chunk.position], [chunk.token_ids])

    def decode(self, decodes: Sequence[Decode]) -> torch.Tensor:
        """Passes one token of each row; returns their logits, `[rows, vocabulary]`."""
        rows = [decode.row for decode in decodes]
        positions = [decode.position for decode in decodes]
        return self._pass(rows, positions, [(decode.token_id,) for decode in decodes])

    def score(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """The logits after each of these tokens, `[tokens, vocabulary]`; row 0 is overwritten."""
        self._cache.ensure(1, bucketed(len(token_ids)))
        return self._pass([0], [0], [token_ids], every=True)

    def forward(self, batch: Batch) -> tuple[list[torch.Tensor], list[int]]:
        """Passes all tokens of a batch; returns the logits of its draws in their order, and their rows."""
        logits: list[torch.Tensor] = []
        rows: list[int] = []
        for chunk in batch.chunks:
            last = self.prefill(chunk)
            if chunk.draw:
                logits.append(last)
                rows.append(chunk.row)
        if batch.decodes:
            logits.append(self._decode_by_length(batch.decodes))
            rows.extend(decode.row for decode in batch.decodes)
        return logits, rows

    def _decode_by_length(self, decodes: Sequence[Decode]) -> torch.Tensor:
        """Passes short and long rows apart where that is faster; the logits are in the order of `decodes`."""
        if self._model.device.type != "cpu":
            return self.decode(decodes)
        groups = split_by_length(decodes, self._pass_positions)
        logits = torch.cat([self.decode(group) for group in groups])
        rows = [decode.row for group in groups for decode in group]
        order = [rows.index(decode.row) for decode in decodes]
        return logits if len(groups) == 1 else logits[order]

    def _pass(
        self,
        rows: list[int],
        positions: list[int],
        token_ids: Sequence[tuple[int, ...]],
        *,
        every: bool = False,
    ) -> torch.Tensor:
        device, tokens = self._model.device, len(token_ids[0])
        length = self._slots.look(rows, positions, tokens)
        starts = torch.tensor(positions, device=device).unsqueeze(1)
        places = starts + torch.arange(tokens, device=device).unsqueeze(0)
        with self._kernels(len(rows) * tokens):
            output = self._model.module(
                input_ids=torch.tensor(token_ids, device=device),
                attention_mask=self._masks(places, length),
                position_ids=places,
                past_key_values=self._slots,
                use_cache=True,
                logits_to_keep=0 if every else 1,
            )
        logits: torch.Tensor = output.logits[0] if every else output.logits[:, -1]
        return logits

    def _masks(self, places: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks `[rows, 1, tokens, length]`, one for each kind of attention in the model."""
        masks = {kind: self._mask(kind, places, length) for kind in self._model.attention}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, kind: str, places: torch.Tensor, length: int) -> torch.Tensor:
        keys = torch.arange(length, device=places.device)
        queries = places.unsqueeze(-1)
        visible = keys <= queries
        if kind == SLIDING:
            visible &= keys > queries - self._model.window
        mask = torch.zeros(visible.shape, dtype=self._model.dtype, device=places.device)
        mask.masked_fill_(~visible, torch.finfo(self._model.dtype).min)
        return mask.unsqueeze(1)

    def _kernels(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """Chooses matrix kernels by row count: oneDNN is slow for a single bfloat16 row on CPU."""
        single = rows == 1 and self._model.device.type == "cpu" and self._model.dtype == torch.bfloat16
        return _without_onednn() if single else contextlib.nullcontext()


class _OneDnnOff:
    """oneDNN's switch, which all threads of the process share, turned off while anybody wants it so.

    A revision warms up in its own thread beside the one that serves: what the first finds is what the last
    restores. Meanwhile the other's passes may go without oneDNN, too, which costs time and changes no more
    than the last digits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before = True

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._depth:
                self._before = _switch_onednn(on=False)
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    _switch_onednn(on=self._before)


_without_onednn = _OneDnnOff()


def _switch_onednn(*, on: bool) -> bool:
    """Turns it on or off, and tells what it was."""
    # The library's own context manager also sets TF32, which warns on machines without it.
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.set_flags(_enabled=on, _fp32_precision=None)[0])
