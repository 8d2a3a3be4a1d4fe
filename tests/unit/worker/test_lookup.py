"""Guesses from what was said before, and the scheduler that checks them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.worker.core.batch import Batch, Choice
from services.worker.core.lookup import REST_TOKENS_MAX, PromptLookup
from services.worker.core.scheduler import NO_TOKEN, Limits, Scheduler
from services.worker.core.sequence import Finish, Output, Sampling, SequenceKey, SequenceStart

# What the model says after the prompt: it quotes it, and goes on.
PROMPT = (1, 2, 3, 4, 5, 6)
SAID = (9, 1, 2, 3, 4, 5, 7, 8, 1, 2, 3, 4, 5, 6, 9, 1)
START = SequenceStart(SequenceKey(0, "a"), PROMPT, len(SAID), credit_tokens=100)


def test_the_last_pair_leads_to_what_followed_it() -> None:
    """The latest occurrence counts, and never the end itself."""
    lookup = PromptLookup()
    assert lookup.guess([1, 2, 3], 3) == ()
    assert lookup.guess([1, 2, 3, 1, 2], 3) == (3, 1, 2)
    assert lookup.guess([1, 2, 3, 1, 2, 4, 1, 2], 2) == (4, 1)
    assert lookup.guess([1, 2, 3, 1, 2, 4, 1, 2, 5, 5, 5], 3) == (5,)
    assert lookup.guess([1], 3) == ()


def test_useless_guesses_become_rare() -> None:
    """Each time nothing was right, the pause doubles, up to a bound; one right token ends that."""
    lookup, history, pauses = PromptLookup(), [1, 1], []
    for _ in range(7):
        pause = 0
        while not lookup.guess(history, 1):
            history.append(1)
            pause += 1
        pauses.append(pause)
        lookup.learn(0)
        history.append(1)
    assert pauses[1:] == [1, 2, 4, 8, 16, 16]
    assert max(pauses) <= REST_TOKENS_MAX
    lookup.learn(1)


def run(start: SequenceStart, guess_tokens: int) -> tuple[list[Output], list[Batch]]:
    """Everything that comes of a sequence whose model says `SAID`, and the steps that it took."""
    limits = Limits(4, 1_024, guess_tokens=guess_tokens)
    scheduler = Scheduler(limits, end_ids=frozenset({8}) if start.max_tokens > len(SAID) else frozenset())
    scheduler.admit(start)
    outputs: list[Output] = []
    batches: list[Batch] = []
    while (batch := scheduler.schedule()) is not None:
        batches.append(batch)
        for decode in batch.decodes:
            assert decode.position + len(decode.guess) < batch.capacity
        outputs.extend(scheduler.apply([Choice(SAID[draw.index]) for draw in batch.draws]))
    return outputs, batches


def said(outputs: list[Output]) -> list[int]:
    """The tokens of some outputs, which follow one another."""
    tokens: list[int] = []
    for output in outputs:
        assert output.index == len(tokens)
        tokens.extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("guess_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_steps_and_never_tokens(guess_tokens: int, temperature: float) -> None:
    """Fewer steps, the same tokens at the same indices, the same end."""
    start = replace(START, sampling=Sampling(temperature=temperature))
    plain, steps = run(start, 0)
    quick, fewer = run(start, guess_tokens)
    assert said(quick) == said(plain) == list(SAID)
    assert quick[-1].finish is plain[-1].finish is Finish.LENGTH
    assert len(fewer) < len(steps)


def test_the_end_is_the_end_inside_a_guess_too() -> None:
    """An end token ends, and a limit or the credit is never overrun."""
    longer = replace(START, max_tokens=100)
    quick, _ = run(longer, 3)
    assert said(quick) == list(SAID[: SAID.index(8)])
    assert quick[-1].finish is Finish.STOP
    for most in range(1, 8):
        assert said(run(replace(START, max_tokens=most), 3)[0]) == list(SAID[:most])
        outputs, _ = run(replace(START, credit_tokens=most), 3)
        assert said(outputs) == list(SAID[:most])
        assert all(output.finish is None for output in outputs)


def test_nothing_is_guessed_for_two_or_under_penalties() -> None:
    """Neighbours share the pass, and a penalty depends on the tokens before."""
    _, batches = run(replace(START, sampling=Sampling(presence_penalty=1.0)), 3)
    assert not any(decode.guess for batch in batches for decode in batch.decodes)
    scheduler = Scheduler(Limits(4, 1_024, guess_tokens=3), frozenset())
    for name in "ab":
        scheduler.admit(replace(START, key=SequenceKey(0, name)))
    for _ in range(8):
        batch = scheduler.schedule()
        assert batch is not None
        assert not any(decode.guess for decode in batch.decodes)
        scheduler.apply([Choice(SAID[draw.index]) for draw in batch.draws])


def test_numbers_that_are_not_finite_end_it_wherever_they_are() -> None:
    """Also behind a guess: what they left in the row would reach the tokens after."""
    scheduler = Scheduler(Limits(4, 1_024, guess_tokens=3), frozenset())
    scheduler.admit(START)
    outputs: tuple[Output, ...] = ()
    while (batch := scheduler.schedule()) is not None:
        choices = [Choice(SAID[draw.index]) for draw in batch.draws]
        if len(choices) > 1:
            choices[-1] = Choice(NO_TOKEN)
        outputs = scheduler.apply(choices)
    assert outputs[-1].finish is Finish.ERROR
    assert scheduler.running == 0
