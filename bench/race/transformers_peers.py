"""The library's own ways to generate, as contestants. Owns: how transformers is called, fairly.

Weights are bfloat16 and attention is the library's `sdpa`, its best on CPU. The libraries keep their own
defaults for everything else, except that their threads are as many as everybody's.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.race.own_engine import Machine
from bench.race.work import Trace, Work

# Nothing is found that takes longer than this for one token of one batch.
_SILENCE_S_MAX = 120.0


class StaticGenerate:
    """`generate` with a static batch: prompts of one length, so that nothing is padded."""

    def __init__(self, directory: Path, machine: Machine) -> None:
        self._model = _read(directory, machine)

    def run(self, work: Work) -> Trace:
        """Does the work."""
        import torch  # noqa: PLC0415 - see _read

        ids = torch.tensor(work.prompts, device=self._model.device)
        settings = _greedy(work.new_tokens)
        watch = _Watch()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=watch
            )
        arrivals = tuple(watch.arrivals_s)
        return Trace((arrivals,) * work.batch)

    def close(self) -> None:
        """Nothing is left behind."""


class ContinuousBatching:
    """The library's continuous batching, through a manager that lives as long as this contestant.

    Its cache has one page for each sequence and some to spare, so it never waits for room. Sharing of
    prefixes is off, as for everybody: the same prompts come again and again.
    """

    def __init__(self, directory: Path, machine: Machine) -> None:
        import transformers  # noqa: PLC0415 - see _read

        self._model = _read(directory, machine)
        make: Any = transformers.ContinuousBatchingConfig
        config = make(num_blocks=2 * machine.slots + 1, allow_block_sharing=False)
        self._manager = self._model.init_continuous_batching(
            generation_config=_greedy(1), continuous_batching_config=config
        )
        self._manager.start()

    def run(self, work: Work) -> Trace:
        """Does the work."""
        began_s = time.perf_counter()
        names = self._manager.add_requests(
            [list(prompt) for prompt in work.prompts], max_new_tokens=work.new_tokens, record_timestamps=True
        )
        found: dict[str, tuple[float, ...]] = {}
        while len(found) < work.batch:
            result = self._manager.get_result(timeout=_SILENCE_S_MAX)
            if result is None or result.error is not None:
                raise RuntimeError(f"Continuous batching ended early: {result and result.error}")
            if result.is_finished():
                found[result.request_id] = tuple(one - began_s for one in result.timestamps)
        return Trace(tuple(found[name] for name in names))

    def close(self) -> None:
        """Ends the manager's thread."""
        self._manager.stop(block=True, timeout=_SILENCE_S_MAX)
        self._manager.destroy()


class _Watch:
    """Notes when tokens arrive; the library hands the prompts to it first."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._prompts_seen = False
        self.arrivals_s: list[float] = []

    def put(self, value: Any) -> None:
        """See the library's `BaseStreamer.put`."""
        del value
        if self._prompts_seen:
            self.arrivals_s.append(time.perf_counter() - self._began_s)
        self._prompts_seen = True

    def end(self) -> None:
        """See the library's `BaseStreamer.end`."""


def _read(directory: Path, machine: Machine) -> Any:
    # The library reads its environment when it is imported; nothing is fetched from anywhere.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 - as said
    import transformers  # noqa: PLC0415 - as said

    torch.set_num_threads(machine.threads)
    cuda = machine.device != "cpu" and torch.cuda.is_available()
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": "cuda" if cuda else "cpu"},
        use_safetensors=True,
        local_files_only=True,
    ).eval()
    # What the model says of ends and sampling would be merged into every call.
    model.generation_config = _greedy(1)
    return model


def _greedy(new_tokens: int) -> Any:
    import transformers  # noqa: PLC0415 - see _read

    make: Any = transformers.GenerationConfig
    settings = make(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    settings.eos_token_id = None
    return settings
