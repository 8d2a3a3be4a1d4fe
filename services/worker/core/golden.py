"""Golden prompts. Owns: the proof that a revision answers what it must. Pure over the runner's port."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.common.errors import ArtifactInvalid
from services.worker.core.ports import ChatTokenizer, ModelRunner
from services.worker.core.revision import GoldenPrompt
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import SequenceKey, SequenceStart


def answer_all(
    runner: ModelRunner,
    tokenizer: ChatTokenizer,
    prompts: Sequence[GoldenPrompt],
    is_over: Callable[[], bool],
) -> None:
    """Answers each prompt greedily, one after the other, as a conversation of one turn.

    Args:
        runner: The loaded revision; nothing else runs on it.
        tokenizer: Its tokenizer and chat template.
        prompts: What it is asked.
        is_over: Whether nobody waits for the answers any more; it is asked before each step.

    Raises:
        ArgumentInvalid: The template refuses a prompt.
        ArtifactInvalid: An answer lacks what it must contain. The message has no prompt and no answer, for it
            is told and logged far and wide.
    """
    for number, prompt in enumerate(prompts, start=1):
        answer = _answer(runner, tokenizer, prompt, number, is_over)
        if is_over():
            return
        check_answer(answer, prompt, number, len(prompts))


def check_answer(answer: str, prompt: GoldenPrompt, number: int, count: int) -> None:
    """Raises ArtifactInvalid where an answer lacks what it must contain; the message has neither of them."""
    if prompt.expected not in answer:
        raise ArtifactInvalid(f"Golden prompt {number} of {count}: its answer does not contain what it must.")


def start_of(session: int, tokenizer: ChatTokenizer, prompt: GoldenPrompt, number: int) -> SequenceStart:
    """A prompt as a conversation of one turn, answered greedily. Blocks.

    Raises:
        ArgumentInvalid: The template refuses it.
    """
    key = SequenceKey(session, f"golden-{number}")
    ids = tokenizer.encode_user(prompt.text)
    return SequenceStart(key, ids, prompt.max_tokens, credit_tokens=prompt.max_tokens)


def _answer(
    runner: ModelRunner,
    tokenizer: ChatTokenizer,
    prompt: GoldenPrompt,
    number: int,
    is_over: Callable[[], bool],
) -> str:
    facts = runner.facts
    start = start_of(0, tokenizer, prompt, number)
    scheduler = Scheduler(Limits(1, facts.kv_tokens), facts.end_ids)
    if start.reserved_tokens > facts.context_tokens or not scheduler.fits(start):
        raise ArtifactInvalid(f"Golden prompt {number} is longer than the revision's context.")
    outputs = list(scheduler.admit(start))
    while not is_over() and (batch := scheduler.schedule()) is not None:
        outputs.extend(scheduler.apply(runner.step(batch)))
    return tokenizer.decode([token_id for output in outputs for token_id in output.token_ids])
