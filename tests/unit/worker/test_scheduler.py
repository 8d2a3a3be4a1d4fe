"""The scheduler: every sequence ends exactly once, with the tokens that it would have had alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.batch import Choice
from services.worker.core.kv_budget import bucketed
from services.worker.core.scheduler import NO_TOKEN, Limits, Scheduler
from services.worker.core.sequence import Finish, Output, SequenceKey, SequenceStart
from tests.fakes.worker_ports import FACTS, FakeRunner, continuation

LIMITS = Limits(slots=4, kv_tokens=FACTS.kv_tokens, chunk_tokens=32, shared_chunk_tokens=16)


def start_of(
    job: str, prompt: int = 3, max_tokens: int = 4, *, credit: int = 1_000, emitted: tuple[int, ...] = ()
) -> SequenceStart:
    """A sequence whose prompt is as long as asked."""
    ids = tuple((7 * len(job) + position) % 900 for position in range(prompt))
    return SequenceStart(SequenceKey(1, job), ids, max_tokens, emitted, credit)


def drive(scheduler: Scheduler, runner: FakeRunner, steps_max: int = 1_000) -> list[Output]:
    """Steps until nothing is left to do."""
    outputs: list[Output] = []
    for _ in range(steps_max):
        batch = scheduler.schedule()
        if batch is None:
            return outputs
        outputs.extend(scheduler.apply(runner.step(batch)))
    raise AssertionError("the scheduler does not come to rest")


def tokens_of(outputs: list[Output], key: SequenceKey) -> list[int]:
    """The tokens of one sequence, after checking that their indices are contiguous."""
    mine = [output for output in outputs if output.key == key]
    expected = mine[0].index
    found: list[int] = []
    for output in mine:
        assert output.index == expected
        expected += len(output.token_ids)
        found.extend(output.token_ids)
    return found


def test_a_sequence_gets_its_tokens_and_one_finish() -> None:
    """A lone sequence yields max_tokens tokens, and LENGTH with the last."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    start = start_of("a", prompt=40, max_tokens=5)
    scheduler.admit(start)
    outputs = drive(scheduler, runner)
    assert tokens_of(outputs, start.key) == continuation(start.prompt_ids, 5)
    assert [output.finish for output in outputs] == [None] * 4 + [Finish.LENGTH]
    assert scheduler.running == 0


def test_an_end_token_stops_and_is_not_told() -> None:
    """The end token ends the sequence with STOP and is not among its tokens."""
    start = start_of("a", max_tokens=50)
    answer = continuation(start.prompt_ids, 50)
    end = answer[6]
    scheduler = Scheduler(LIMITS, frozenset({end}))
    scheduler.admit(start)
    outputs = drive(scheduler, FakeRunner())
    assert tokens_of(outputs, start.key) == answer[: answer.index(end)]
    assert outputs[-1].finish is Finish.STOP


def test_a_continuation_goes_on_at_the_next_index() -> None:
    """What earlier workers emitted is prefilled, and the first token has the next index."""
    whole = start_of("a", max_tokens=9)
    answer = continuation(whole.prompt_ids, 9)
    scheduler = Scheduler(LIMITS, frozenset())
    scheduler.admit(start_of("a", max_tokens=9, emitted=tuple(answer[:5])))
    outputs = drive(scheduler, FakeRunner())
    assert outputs[0].index == 5
    assert tokens_of(outputs, whole.key) == answer[5:]


def test_a_complete_continuation_ends_without_a_step() -> None:
    """A job whose tokens were all emitted already ends with LENGTH and takes no slot."""
    scheduler = Scheduler(LIMITS, frozenset())
    (output,) = scheduler.admit(start_of("a", max_tokens=2, emitted=(1, 2)))
    assert (output.index, output.finish) == (2, Finish.LENGTH)
    assert scheduler.running == 0


def test_slots_and_cache_bound_admission() -> None:
    """Neither more sequences than slots fit, nor a rectangle larger than the cache."""
    scheduler = Scheduler(LIMITS, frozenset())
    for job in ("a", "bb", "ccc", "dddd"):
        assert scheduler.fits(start_of(job))
        scheduler.admit(start_of(job))
    assert not scheduler.fits(start_of("eeeee"))
    narrow = Scheduler(Limits(slots=8, kv_tokens=64), frozenset())
    narrow.admit(start_of("a", prompt=20, max_tokens=10))
    assert narrow.fits(start_of("bb", prompt=20, max_tokens=12))
    assert not narrow.fits(start_of("bb", prompt=20, max_tokens=13))


def test_a_sequence_without_credit_pauses_and_keeps_its_slot() -> None:
    """At zero credit nothing is scheduled; added credit lets it run to its end."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    start = start_of("a", max_tokens=6, credit=2)
    scheduler.admit(start)
    outputs = drive(scheduler, runner)
    assert len(tokens_of(outputs, start.key)) == 2
    assert scheduler.running == 1
    assert not scheduler.has_work
    assert scheduler.paused_by_session() == {1: 1}
    scheduler.add_credit(start.key, 100)
    outputs += drive(scheduler, runner)
    assert tokens_of(outputs, start.key) == continuation(start.prompt_ids, 6)


def test_a_cancelled_sequence_frees_its_slot_at_once() -> None:
    """The row is free before the next step, and the neighbour that moves into it goes on unharmed."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    first, second = start_of("a", max_tokens=10), start_of("bb", max_tokens=10)
    scheduler.admit(first)
    scheduler.admit(second)
    batch = scheduler.schedule()
    assert batch is not None
    outputs = list(scheduler.apply(runner.step(batch)))
    (cancelled,) = scheduler.end(first.key, Finish.CANCELLED)
    assert (cancelled.index, cancelled.finish) == (1, Finish.CANCELLED)
    assert scheduler.running == 1
    outputs += drive(scheduler, runner)
    assert tokens_of(outputs, second.key) == continuation(second.prompt_ids, 10)


def test_a_row_without_finite_logits_ends_with_error_alone() -> None:
    """NO_TOKEN ends its own sequence with ERROR; the other one is complete."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    bad, good = start_of("a"), start_of("bb")
    runner.poisoned = frozenset({bad.prompt_ids[0]})
    scheduler.admit(bad)
    scheduler.admit(good)
    outputs = drive(scheduler, runner)
    assert [output.finish for output in outputs if output.key == bad.key] == [Finish.ERROR]
    assert tokens_of(outputs, good.key) == continuation(good.prompt_ids, 4)


def test_a_format_that_cannot_be_followed_says_so_with_its_end() -> None:
    """The words of its choice come with ERROR; those of a row without finite logits have none."""
    scheduler = Scheduler(LIMITS, frozenset())
    impossible, bad = start_of("a"), start_of("bb")
    for start in (impossible, bad):
        scheduler.admit(start)
        assert scheduler.schedule() is not None
        scheduler.apply([Choice(5)] * scheduler.running)
    assert scheduler.schedule() is not None
    ends = scheduler.apply([Choice(NO_TOKEN, flaw="format.regex: why"), Choice(NO_TOKEN)])
    assert [(end.finish, end.flaw) for end in ends] == [
        (Finish.ERROR, "format.regex: why"),
        (Finish.ERROR, ""),
    ]
    told = Output(impossible.key, 0, (5,)).followed_by(ends[0])
    head, rest = replace(told, token_ids=(5, 6)).split(1)
    assert (told.flaw, head.flaw, rest.flaw) == ("format.regex: why", "", "format.regex: why")


def test_running_decodes_wait_for_one_bounded_chunk_only() -> None:
    """While a long prompt is prefilled, each step decodes, and takes at most the shared chunk."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    scheduler.admit(start_of("a", max_tokens=30))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.apply(runner.step(batch))
    scheduler.admit(start_of("bb", prompt=200, max_tokens=2))
    drive(scheduler, runner)
    shared = [batch for batch in runner.batches if batch.chunks and batch.decodes]
    assert len(shared) == -(-200 // LIMITS.shared_chunk_tokens)
    for batch in shared:
        assert sum(len(chunk.token_ids) for chunk in batch.chunks) <= LIMITS.shared_chunk_tokens


def test_the_newest_of_many_prefills_gets_its_turn() -> None:
    """Prefills take turns: a short prompt behind long ones starts before they are done."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    for job in ("a", "bb", "ccc"):
        scheduler.admit(start_of(job, prompt=200, max_tokens=2))
    newest = start_of("dddd", prompt=10, max_tokens=2)
    scheduler.admit(newest)
    outputs = drive(scheduler, runner)
    assert outputs[0].key == newest.key


@dataclass
class Plan:
    """What one sequence of a random run asks for, and when something happens to it."""

    arrives: int
    prompt: list[int]
    max_tokens: int
    credit: int
    cut: int
    cancel_at: int | None
    outputs: list[Output] = field(default_factory=list)


PLANS = st.lists(
    st.builds(
        Plan,
        arrives=st.integers(0, 12),
        prompt=st.lists(st.integers(0, 900), min_size=1, max_size=70),
        max_tokens=st.integers(1, 12),
        credit=st.integers(0, 5),
        cut=st.integers(0, 12),
        cancel_at=st.none() | st.integers(0, 25),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60)
@given(plans=PLANS)
def test_any_mixture_ends_each_sequence_once_with_its_own_tokens(plans: list[Plan]) -> None:
    """Arrivals, cancels, credit and cuts in any order: slots hold, indices are contiguous, none is lost."""
    scheduler, runner = Scheduler(LIMITS, frozenset()), FakeRunner()
    waiting = {SequenceKey(1, str(number)): plan for number, plan in enumerate(plans)}
    running: dict[SequenceKey, Plan] = {}
    for step in range(2_000):
        events: list[Output] = []
        for key, plan in tuple(waiting.items()):
            emitted = tuple(continuation(plan.prompt, plan.cut)[: plan.max_tokens])
            start = SequenceStart(key, tuple(plan.prompt), plan.max_tokens, emitted, plan.credit)
            if plan.arrives <= step and scheduler.fits(start):
                running[key] = waiting.pop(key)
                events += scheduler.admit(start)
        for key, plan in running.items():
            if plan.cancel_at == step:
                events += scheduler.end(key, Finish.CANCELLED)
            scheduler.add_credit(key, step % 2)
        assert scheduler.running <= LIMITS.slots
        if (batch := scheduler.schedule()) is not None:
            assert batch.rows * bucketed(batch.capacity) <= LIMITS.kv_tokens
            events += scheduler.apply(runner.step(batch))
        for output in events:
            running[output.key].outputs.append(output)
        if not waiting and not scheduler.running:
            break
    for key, plan in running.items():
        check_ended(key, plan)
    assert len(running) == len(plans)
    assert scheduler.running == 0


def check_ended(key: SequenceKey, plan: Plan) -> None:
    """One finish, at the end; the tokens are those of a run alone, from the cut on."""
    assert [output.finish is not None for output in plan.outputs] == [False] * (len(plan.outputs) - 1) + [
        True
    ]
    emitted = min(plan.cut, plan.max_tokens)
    assert plan.outputs[0].index == emitted
    found = tokens_of(plan.outputs, key)
    whole = continuation(plan.prompt, plan.max_tokens)
    assert found == whole[emitted : emitted + len(found)]
    if plan.outputs[-1].finish is Finish.LENGTH:
        assert emitted + len(found) == plan.max_tokens
    else:
        assert plan.outputs[-1].finish is Finish.CANCELLED
