"""Rows of the KV cache: prefixes are found and yield, the newest is preempted, no token is told twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.batch import Decode, Draw
from services.worker.core.kv_budget import PREEMPTIONS_MAX, bucketed
from services.worker.core.length_groups import split_by_length
from services.worker.core.prefix_cache import PREFIX_TOKENS_MIN, common_tokens
from services.worker.core.revision import ModelFacts
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Finish, Output, Sampling, SequenceKey, SequenceStart
from tests.fakes.worker_ports import VOCABULARY, FakeRunner, continuation

AREA = 4_096


def facts(kv_tokens: int = AREA) -> ModelFacts:
    """A model whose cache has this area."""
    return ModelFacts(VOCABULARY, 512, frozenset(), kv_tokens, 1_000)


def limits(kv_tokens: int = AREA, *, slots: int = 8, share: float = 0.5) -> Limits:
    """Short chunks; a share of the area for prefixes."""
    return Limits(slots, kv_tokens, 64, 16, int(kv_tokens * share))


def start(job: str, prompt: list[int], tokens: int = 4, *, credit: int = 1_000) -> SequenceStart:
    """A sequence with a prompt."""
    return SequenceStart(SequenceKey(1, job), tuple(prompt), tokens, (), credit)


def rest(scheduler: Scheduler, runner: FakeRunner) -> list[Output]:
    """Steps until nothing is left to do."""
    outputs: list[Output] = []
    for _ in range(5_000):
        batch = scheduler.schedule()
        if batch is None:
            return outputs
        outputs.extend(scheduler.apply(runner.step(batch)))
    raise AssertionError("the scheduler does not come to rest")


def tokens_of(outputs: list[Output], job: str) -> list[int]:
    """The tokens of one job; their indices are contiguous."""
    found: list[int] = []
    for output in (one for one in outputs if one.key.job == job):
        assert output.index == len(found)
        found.extend(output.token_ids)
    return found


def prompt_of(seed: int, length: int) -> list[int]:
    """A prompt that no other seed begins like."""
    return [(seed * 131 + 7 * place) % VOCABULARY for place in range(length)]


def test_a_second_turn_computes_its_new_tokens_alone() -> None:
    """A chat's next turn finds the row of the turn before, in place, and is told so with its first output."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    prompt = prompt_of(1, 200)
    scheduler.admit(start("a", prompt, 10))
    history = [*prompt, *tokens_of(rest(scheduler, runner), "a"), *prompt_of(2, 20)]
    computed = runner.computed_tokens
    scheduler.admit(start("b", history, 5))
    outputs = rest(scheduler, runner)
    # The first turn's last token was told, but never passed the model.
    assert runner.computed_tokens - computed == len(history) - (200 + 9) + 4
    assert [one.cached_prompt_tokens for one in outputs] == [209, 0, 0, 0, 0]
    assert tokens_of(outputs, "b") == continuation(history, 5)
    assert not any(batch.moves for batch in runner.batches)


def test_the_same_prompt_again_computes_one_token() -> None:
    """At least one token passes the model, for the next one comes from it."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    cached: list[int] = []
    for job in ("a", "b"):
        scheduler.admit(start(job, prompt_of(1, 100), 1))
        cached += [output.cached_prompt_tokens for output in rest(scheduler, runner)]
    assert runner.computed_tokens == 101
    assert cached == [0, 99]


def test_what_runs_is_found_too() -> None:
    """A sequence copies a prefix from one that still runs, and both get their own tokens."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    shared = prompt_of(1, 90)
    scheduler.admit(start("a", [*shared, 1], 40))
    for _ in range(5):
        scheduler.apply(runner.step(scheduler.schedule() or pytest.fail("idle")))
    scheduler.admit(start("b", [*shared, 2], 6))
    outputs = rest(scheduler, runner)
    assert next(one for one in outputs if one.key.job == "b").cached_prompt_tokens == 90
    assert tokens_of(outputs, "b") == continuation([*shared, 2], 6)


def test_twins_that_arrive_together_are_prefilled_once() -> None:
    """Sequences with one long prompt wait for the first of them rather than all doing the same work."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    prompt = prompt_of(3, 150)
    for job in "abcd":
        scheduler.admit(start(job, prompt, 3))
    outputs = rest(scheduler, runner)
    for job in "abcd":
        assert tokens_of(outputs, job) == continuation(prompt, 3)
    assert runner.computed_tokens == 150 + 3 * 1 + 4 * 2


def test_a_share_of_zero_keeps_and_finds_nothing() -> None:
    """Without a share every prompt is computed whole, twins included."""
    scheduler, runner = Scheduler(limits(share=0), frozenset()), FakeRunner(facts())
    for job in "abc":
        scheduler.admit(start(job, prompt_of(1, 50), 1))
        if job == "a":
            rest(scheduler, runner)
    rest(scheduler, runner)
    assert runner.computed_tokens == 150
    assert scheduler.cached_rows == 0


def test_the_least_recently_used_prefix_goes_first() -> None:
    """With room for two prefixes, the one that was found again outlives the one that was not."""
    scheduler = Scheduler(Limits(8, 6 * 64, 64, 16, 2 * 64), frozenset())
    runner = FakeRunner(facts(6 * 64))
    cached = {}
    for number, seed in enumerate((1, 2, 1, 3, 4, 1, 2)):
        scheduler.admit(start(str(number), prompt_of(seed, 50), 4))
        cached[number] = rest(scheduler, runner)[0].cached_prompt_tokens > 0
    assert [cached[number] for number in range(7)] == [False, False, True, False, False, True, False]


def test_prefixes_yield_at_once_to_what_needs_room() -> None:
    """However full of prefixes the cache is, sequences are admitted as if it were empty."""
    scheduler, runner = Scheduler(limits(1_024, share=0.9), frozenset()), FakeRunner(facts(1_024))
    for number in range(12):
        scheduler.admit(start(str(number), prompt_of(number, 60), 4))
        rest(scheduler, runner)
    assert scheduler.cached_rows > 5
    wanted = start("wide", prompt_of(77, 900), 100)
    assert scheduler.fits(wanted)
    scheduler.admit(wanted)
    assert tokens_of(rest(scheduler, runner), "wide") == continuation(wanted.prompt_ids, 100)
    assert scheduler.cached_rows == 1


def test_a_failed_step_forgets_the_prefixes() -> None:
    """After an exception nobody knows what the rows hold; the next prompt is computed whole."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    scheduler.admit(start("a", prompt_of(1, 50), 2))
    rest(scheduler, runner)
    scheduler.admit(start("b", prompt_of(1, 50), 2))
    scheduler.schedule()
    (failed,) = scheduler.fail()
    assert failed.finish is Finish.ERROR
    assert scheduler.cached_rows == 0


def test_a_row_that_was_not_finite_is_not_kept() -> None:
    """The row of a sequence that ended with ERROR is nobody's prefix."""
    scheduler, runner = Scheduler(limits(), frozenset()), FakeRunner(facts())
    prompt = prompt_of(1, 50)
    runner.poisoned = frozenset({prompt[0]})
    scheduler.admit(start("a", prompt))
    assert rest(scheduler, runner)[0].finish is Finish.ERROR
    assert scheduler.cached_rows == 0


def test_admission_counts_what_is_needed_now() -> None:
    """Sequences that may become long start together while they are short."""
    scheduler = Scheduler(limits(1_024, share=0), frozenset())
    for job in "abcdefgh":
        one = start(job, prompt_of(ord(job), 10), 300)
        assert scheduler.fits(one)
        scheduler.admit(one)
    never = start("i", prompt_of(1, 100), 1_000)
    assert not Scheduler(limits(1_024), frozenset()).fits(never)


def test_when_the_room_ends_the_newest_waits_and_no_token_is_told_twice() -> None:
    """The oldest is never interrupted, and all get the tokens that they would have had alone."""
    scheduler, runner = Scheduler(limits(1_024, share=0), frozenset()), FakeRunner(facts(1_024))
    prompts = {job: prompt_of(ord(job), 10) for job in "abcdefgh"}
    for job, prompt in prompts.items():
        scheduler.admit(start(job, prompt, 300))
    outputs = rest(scheduler, runner)
    for job, prompt in prompts.items():
        assert tokens_of(outputs, job) == continuation(prompt, 300)
    ends = [one.key.job for one in outputs if one.finish]
    assert ends[0] == "a"
    assert sorted(ends) == list("abcdefgh")
    # Each may lose its row a few times, and loses less than its whole length each time.
    assert runner.computed_tokens <= 8 * 310 * (PREEMPTIONS_MAX + 1)
    assert runner.computed_tokens < 2 * 8 * 310


def test_nobody_is_preempted_without_end() -> None:
    """Over a whole run no sequence loses its row more often than the bound says."""
    scheduler, runner = Scheduler(limits(512, share=0), frozenset()), FakeRunner(facts(512))
    for job in "abcde":
        scheduler.admit(start(job, prompt_of(ord(job), 20), 200))
    most = 0
    while (batch := scheduler.schedule()) is not None:
        scheduler.apply(runner.step(batch))
        most = max([most, *(live.preemptions for live in scheduler._live.values())])
    assert 0 < most <= PREEMPTIONS_MAX


def test_a_paused_sequence_gives_its_row_to_one_that_can_run() -> None:
    """Readers that stop reading hold slots, but not the memory that others wait for."""
    scheduler, runner = Scheduler(limits(256, share=0), frozenset()), FakeRunner(facts(256))
    slow, fast = start("slow", prompt_of(1, 20), 100, credit=40), start("fast", prompt_of(2, 20), 200)
    scheduler.admit(slow)
    outputs = rest(scheduler, runner)
    assert scheduler.fits(fast)
    scheduler.admit(fast)
    outputs += rest(scheduler, runner)
    assert tokens_of(outputs, "fast") == continuation(fast.prompt_ids, 200)
    scheduler.add_credit(slow.key, 100)
    outputs += rest(scheduler, runner)
    assert tokens_of(outputs, "slow") == continuation(slow.prompt_ids, 100)


@given(
    positions=st.lists(st.integers(0, 3_000), min_size=1, max_size=40), pass_positions=st.integers(0, 20_000)
)
def test_groups_by_length_hold_every_row_once_and_pay(positions: list[int], pass_positions: int) -> None:
    """No row is lost, both groups ascend, and a second one saves more positions than a pass costs."""
    draw = Draw(Sampling(), 0, 0)
    decodes = [Decode(row, position, 1, draw) for row, position in enumerate(positions)]
    groups = split_by_length(decodes, pass_positions)
    assert sorted((one for group in groups for one in group), key=lambda one: one.row) == decodes
    assert all(list(group) == sorted(group, key=lambda one: one.row) for group in groups)

    def read(group: Sequence[Decode]) -> int:
        return len(group) * bucketed(max(one.position for one in group) + 1)

    if len(groups) > 1:
        assert read(decodes) - sum(read(group) for group in groups) > pass_positions


@given(
    one=st.lists(st.integers(0, 3), max_size=200), cut=st.integers(0, 200), other=st.lists(st.integers(0, 3))
)
def test_common_tokens_are_the_longest_common_beginning(one: list[int], cut: int, other: list[int]) -> None:
    """The comparison by pieces finds what a comparison one by one finds."""
    mixed = [*one[:cut], *other]
    pairs = zip(one, mixed, strict=False)
    wanted = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(mixed)))
    assert common_tokens(one, mixed, 10**6) == wanted
    assert common_tokens(one, mixed, 5) == min(5, wanted)


@dataclass
class Request:
    """One of many random requests, and what came of it."""

    start: SequenceStart
    cancels: bool
    outputs: list[Output] = field(default_factory=list)

    def check(self) -> None:
        """One finish, at the end; the tokens are those of a run alone."""
        assert [one.finish is not None for one in self.outputs[:-1]] == [False] * (len(self.outputs) - 1)
        found = tokens_of(self.outputs, self.start.key.job)
        assert found == continuation(self.start.prompt_ids, len(found))
        if self.outputs[-1].finish is Finish.LENGTH:
            assert len(found) == self.start.max_tokens
        else:
            assert self.outputs[-1].finish is Finish.CANCELLED
            assert self.cancels


def draw_request(chance: random.Random, number: int, longest: int) -> Request:
    """A prompt that often begins like others, a length, some credit, and perhaps a client that leaves."""
    shared = prompt_of(chance.randrange(6), longest)[: chance.randrange(longest)]
    own = [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, longest))]
    credit = chance.choice((0, 5, 1_000))
    one = SequenceStart(SequenceKey(1, str(number)), (*shared, *own), chance.randrange(1, 60), (), credit)
    return Request(one, cancels=chance.random() < 0.2)


def serve(requests: list[Request], scheduler: Scheduler, runner: FakeRunner, chance: random.Random) -> None:
    """Admits requests as they fit, gives credit now and then, cancels some, until all have ended."""
    waiting, open_ones = requests[::-1], dict[SequenceKey, Request]()
    for _ in range(100_000):
        events: list[Output] = []
        while waiting and scheduler.fits(waiting[-1].start):
            request = waiting.pop()
            open_ones[request.start.key] = request
            events += scheduler.admit(request.start)
        for key, request in open_ones.items():
            if request.cancels and chance.random() < 0.05:
                events += scheduler.end(key, Finish.CANCELLED)
            elif chance.random() < 0.1:
                scheduler.add_credit(key, chance.randrange(20))
        if (batch := scheduler.schedule()) is not None:
            events += scheduler.apply(runner.step(batch))
        for output in events:
            open_ones[output.key].outputs.append(output)
            if output.finish:
                del open_ones[output.key]
        if not waiting and not open_ones:
            return
    raise AssertionError("not every request ends")


def test_a_thousand_random_requests_leave_nothing_behind() -> None:
    """Lengths, credit and cancels at random in a cache that is too small: each request ends once, rightly."""
    chance = random.Random(20)  # noqa: S311 - test data
    scheduler, runner = Scheduler(limits(1_024, slots=8), frozenset()), FakeRunner(facts(1_024))
    requests = [draw_request(chance, number, 120) for number in range(1_000)]
    serve(requests, scheduler, runner, chance)
    for request in requests:
        request.check()
    assert any(one.outputs[0].cached_prompt_tokens >= PREFIX_TOKENS_MIN for one in requests)
    assert scheduler.running == 0
    assert not scheduler._turns
    scheduler.clear()
    assert scheduler.cached_rows == 0
    assert scheduler._rows.running == []


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), area=st.sampled_from((320, 512, 2_048)), share=st.sampled_from((0, 0.2, 0.9))
)
def test_any_budget_and_share_serve_everyone(seed: int, area: int, share: float) -> None:
    """Whatever the room: rows stay inside it at every step (the runner checks), and all requests end."""
    chance = random.Random(seed)  # noqa: S311 - test data
    scheduler, runner = Scheduler(limits(area, slots=6, share=share), frozenset()), FakeRunner(facts(area))
    requests = [draw_request(chance, number, 90) for number in range(25)]
    serve(requests, scheduler, runner, chance)
    for request in requests:
        request.check()
    assert scheduler.running == 0
