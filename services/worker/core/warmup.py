"""Warm-up. Owns: the proof that a loaded revision generates, and generates at speed. Pure over the port."""

from __future__ import annotations

from services.common.errors import ArtifactInvalid
from services.worker.core.ports import ModelRunner
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart

# Enough to pass through prefill, decode with one row and decode with several.
PROMPT_TOKENS = 12
TOKENS = 3
SEQUENCES = 2


def warm(runner: ModelRunner) -> None:
    """Generates a few tokens for several sequences at once, as serving does, and rehearses the rest.

    Where the KV cache holds only one of them, serving will have no more at once either.

    Raises:
        ArtifactInvalid: The model yields no finite logits: its weights are damaged. Or its KV cache holds
            no sequence at all.
    """
    facts = runner.facts
    scheduler = Scheduler(Limits(SEQUENCES, facts.kv_tokens), end_ids=frozenset())
    prompt = tuple(position % facts.vocabulary for position in range(1, PROMPT_TOKENS + 1))
    for number in range(SEQUENCES):
        key = SequenceKey(0, "warm-up", sequence=number)
        start = SequenceStart(key, prompt[number:], TOKENS, credit_tokens=TOKENS)
        if scheduler.fits(start):
            scheduler.admit(start)
    if not scheduler.running:
        raise ArtifactInvalid(
            f"Its KV cache has room for {facts.kv_tokens} tokens, which is none to serve with."
            " Give the worker more memory, or set kv_cache_bytes."
        )
    outputs: list[Output] = []
    while (batch := scheduler.schedule()) is not None:
        outputs.extend(scheduler.apply(runner.step(batch)))
    if any(output.finish is Finish.ERROR for output in outputs):
        raise ArtifactInvalid("The model yields numbers that are not finite; its weights are damaged.")
    runner.rehearse()
