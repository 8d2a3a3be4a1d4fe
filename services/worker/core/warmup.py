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

    Raises:
        ArtifactInvalid: The model yields no finite logits: its weights are damaged.
    """
    facts = runner.facts
    scheduler = Scheduler(Limits(SEQUENCES, facts.kv_tokens), end_ids=frozenset())
    prompt = tuple(position % facts.vocabulary for position in range(1, PROMPT_TOKENS + 1))
    for number in range(SEQUENCES):
        key = SequenceKey(0, "warm-up", sequence=number)
        scheduler.admit(SequenceStart(key, prompt[number:], TOKENS, credit_tokens=TOKENS))
    outputs: list[Output] = []
    while (batch := scheduler.schedule()) is not None:
        outputs.extend(scheduler.apply(runner.step(batch)))
    if any(output.finish is Finish.ERROR for output in outputs):
        raise ArtifactInvalid("The model yields numbers that are not finite; its weights are damaged.")
    runner.rehearse()
