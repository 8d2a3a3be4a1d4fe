"""The worker's small pure parts: noise, admission, phases, and the outbox."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InternalError
from services.gateway.adapters.grpc_worker import STALL_S
from services.worker.adapters.job_messages import step_output
from services.worker.core.admission import Reason, Refusal
from services.worker.core.noise import uniform
from services.worker.core.outbox import (
    ALTERNATIVE_TOKENS,
    REFUSALS_MAX,
    SCORE_TOKENS,
    STEP_TOKENS_MAX,
    Outbox,
    OutboxFull,
)
from services.worker.core.pace import (
    CHUNK_TOKENS_MIN,
    GROWTH_MAX,
    LOOK_STEPS,
    PREFILL_STEP_S_MAX,
    SHARED_TOKENS_FIRST,
    STALL_RATIO,
    TOKENS_FIRST,
    PrefillPace,
)
from services.worker.core.revision import NEXT, Phase, Residency
from services.worker.core.sequence import Finish, Output, SequenceKey, TokenScore

KEY = SequenceKey(1, "a")


@given(seed=st.integers(0, 2**64 - 1), sequence=st.integers(0, 3), index=st.integers(0, 2**20))
def test_noise_is_a_function_of_its_three_names(seed: int, sequence: int, index: int) -> None:
    """Equal names give equal numbers in [0, 1); a neighbour's name gives another."""
    value = uniform(seed, sequence, index)
    assert 0 <= value < 1
    assert value == uniform(seed, sequence, index)
    others = {uniform(seed ^ 1, sequence, index), uniform(seed, sequence + 1, index)}
    assert value not in others | {uniform(seed, sequence, index + 1)}


def test_noise_is_uniform() -> None:
    """Mean and deviation of many draws are those of the uniform distribution."""
    values = [uniform(7, 0, index) for index in range(20_000)]
    assert statistics.mean(values) == pytest.approx(0.5, abs=0.01)
    assert statistics.pstdev(values) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("following", list(Phase))
def test_phases_follow_their_table(phase: Phase, following: Phase) -> None:
    """A step that the table lacks raises and changes nothing."""
    residency = Residency()
    residency.begin("m", "r")
    known = residency.find("r")
    assert known is not None
    residency._by_name["r"] = type(known)("m", "r", phase)
    if following in NEXT[phase]:
        residency.enter("r", following)
        assert residency.all[0].phase is following
    else:
        with pytest.raises(InternalError):
            residency.enter("r", following)
        assert residency.all[0].phase is phase


def test_the_epoch_never_goes_back() -> None:
    """An activation with an older epoch leaves the newer one."""
    residency = Residency()
    residency.begin("m", "r")
    for phase in (Phase.VERIFY, Phase.LOAD, Phase.WARM, Phase.READY):
        residency.enter("r", phase)
    residency.activate("r", 9)
    residency.activate("r", 4)
    assert residency.epoch == 9
    assert residency.serving


def test_outputs_of_a_sequence_join_while_nobody_reads() -> None:
    """However many steps pass, one sequence has one output, with its first index and its finish."""
    outbox = Outbox()
    for index in range(5):
        outbox.put_output(Output(KEY, index, (index,)))
    outbox.put_output(Output(KEY, 5, (), Finish.STOP))
    assert outbox.take().outputs == (Output(KEY, 0, (0, 1, 2, 3, 4), Finish.STOP),)
    assert outbox.empty


def test_a_letter_stays_inside_one_message() -> None:
    """More tokens than a message carries go into several letters, none lost."""
    outbox = Outbox()
    for number in range(3):
        key = SequenceKey(1, str(number))
        outbox.put_output(Output(key, 0, (1,) * (STEP_TOKENS_MAX // 2)))
    assert [len(outbox.take().outputs) for _ in range(2)] == [2, 1]


def test_scores_weigh_in_a_letter() -> None:
    """An output that is too heavy for one message is cut between tokens, each with its score, none lost."""
    outbox = Outbox()
    tokens, heavy = 4_000, TokenScore(-1.0, tuple((token, -1.0) for token in range(20)))
    outbox.put_output(Output(KEY, 0, tuple(range(tokens)), Finish.LENGTH, (heavy,) * tokens))
    outbox.put_output(Output(SequenceKey(1, "other"), 0, (1,)))
    letters = []
    while not outbox.empty:
        letters.append(outbox.take())
        weight = sum(one.ByteSize() for one in map(step_output, letters[-1].outputs))
        assert weight < 2 << 20
    assert len(letters) > 1
    parts = [output for letter in letters for output in letter.outputs if output.key == KEY]
    whole = parts[0]
    for part in parts[1:]:
        assert part.index == len(whole.token_ids)
        assert whole.finish is None
        whole = whole.followed_by(part)
    assert whole == Output(KEY, 0, tuple(range(tokens)), Finish.LENGTH, (heavy,) * tokens)


def test_a_first_output_keeps_its_cached_tokens_where_the_letter_is_full() -> None:
    """It goes whole into the next letter: what was found in the prefix cache is told with its first token."""
    outbox, later = Outbox(), Output(SequenceKey(1, "later"), 0, (1, 2), cached_prompt_tokens=512)
    heavy = TokenScore(-1.0, tuple((token, -1.0) for token in range(20)))
    tokens = STEP_TOKENS_MAX // (1 + SCORE_TOKENS + 20 * ALTERNATIVE_TOKENS)
    outbox.put_output(Output(KEY, 0, tuple(range(tokens)), None, (heavy,) * tokens))
    outbox.put_output(replace(later, scores=(heavy, heavy)))
    assert [output.key for output in outbox.take().outputs] == [KEY]
    assert outbox.take().outputs == (replace(later, scores=(heavy, heavy)),)


def test_unread_refusals_are_bounded() -> None:
    """A gateway that is refused without end and reads nothing overflows its outbox."""
    outbox = Outbox()
    for _ in range(REFUSALS_MAX):
        outbox.put_refusal(Refusal(KEY, Reason.BUSY))
    with pytest.raises(OutboxFull):
        outbox.put_refusal(Refusal(KEY, Reason.BUSY))


def test_slow_prefill_steps_shorten_chunks_and_fast_ones_lengthen_them() -> None:
    """A chunk takes about the time that it may; what the machine does decides its length."""
    pace = at_its_longest()
    pace.note(PREFILL_STEP_S_MAX * 2, chunk_tokens=512, decodes=0)
    assert pace.budget(decodes=0) == 256
    pace.note(PREFILL_STEP_S_MAX / 10, chunk_tokens=40, decodes=0)
    assert pace.budget(decodes=0) == 256
    for _ in range(4):
        pace.note(PREFILL_STEP_S_MAX / 2, chunk_tokens=pace.budget(decodes=0), decodes=0)
    assert pace.budget(decodes=0) == 512


def at_its_longest() -> PrefillPace:
    """The pace of a machine that was quick so far."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    lengths = []
    for _ in range(4):
        lengths.append(pace.budget(decodes=0))
        pace.note(PREFILL_STEP_S_MAX / 5, chunk_tokens=lengths[-1], decodes=0)
    assert lengths == [TOKENS_FIRST, 128, 256, 512]
    return pace


@pytest.mark.parametrize("token_s", [0.03, 0.1])
def test_a_slow_model_takes_no_step_for_a_hang(token_s: float) -> None:
    """Nor its first one, of which nothing is known: gateways give up a worker whose steps stand still."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    steps_s = []
    for _ in range(30):
        tokens = pace.budget(decodes=0)
        steps_s.append(token_s * tokens)
        pace.note(steps_s[-1], chunk_tokens=tokens, decodes=0)
    assert max(steps_s) < STALL_S
    assert max(steps_s[1:]) <= max(PREFILL_STEP_S_MAX * GROWTH_MAX, token_s * CHUNK_TOKENS_MIN)


def test_a_leap_does_not_lead_beyond_the_time_of_a_step() -> None:
    """Attention makes long chunks dearer than their share: twice the tokens take up to four times as long."""
    pace = PrefillPace(chunk_tokens=4_096, shared_chunk_tokens=128)
    for _ in range(30):
        tokens = pace.budget(decodes=0)
        step_s = 4e-6 * tokens**2
        assert step_s <= PREFILL_STEP_S_MAX * GROWTH_MAX**2
        pace.note(step_s, chunk_tokens=tokens, decodes=0)


def test_a_shared_chunk_is_paced_by_the_decode_beside_it() -> None:
    """The faster decodes are, the shorter the chunks that they wait for, down to a floor."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    for decode_s in (0.064, 0.032, 0.001):
        for _ in range(30):
            pace.note(decode_s, chunk_tokens=0, decodes=8)
        for _ in range(30):
            tokens = pace.budget(decodes=8)
            # A chunk has a cost of its own, whatever its length.
            pace.note(decode_s + 0.02 + 0.001 * tokens, chunk_tokens=tokens, decodes=8)
        wanted = ((STALL_RATIO - 1) * decode_s - 0.02) / 0.001
        assert pace.budget(decodes=8) == pytest.approx(max(CHUNK_TOKENS_MIN, wanted), abs=2)


def test_a_chunk_beside_many_streams_is_not_paced_by_what_few_take() -> None:
    """The first step with so many goes without a chunk, and what it took counts for as many alone."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    for decodes, decode_s in ((1, 0.02), (32, 0.08)):
        assert pace.budget(decodes=decodes) == 0
        pace.note(decode_s, chunk_tokens=0, decodes=decodes)
    for _ in range(30):
        tokens = pace.budget(decodes=32)
        pace.note(0.08 + 0.001 * tokens, chunk_tokens=tokens, decodes=32)
    assert pace.budget(decodes=32) == pytest.approx((STALL_RATIO - 1) * 0.08 / 0.001, abs=2)
    assert pace.budget(decodes=26) > 0
    for decodes in (20, 33):
        assert pace.budget(decodes=decodes) == 0
        # Whatever became of that step: prompts do not wait for ever.
        assert pace.budget(decodes=decodes) > 0


def test_now_and_then_a_step_goes_without_a_chunk() -> None:
    """Prompts that never end do not hide that the machine has become slower."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    pace.note(0.01, chunk_tokens=0, decodes=8)
    for _ in range(LOOK_STEPS):
        tokens = pace.budget(decodes=8)
        assert tokens > 0
        pace.note(0.05, chunk_tokens=tokens, decodes=8)
    assert pace.budget(decodes=8) == 0
    pace.note(0.04, chunk_tokens=0, decodes=8)
    assert pace.budget(decodes=8) > 0


def test_a_prompt_alone_in_its_revision_is_short_beside_another_ones_streams() -> None:
    """They wait for its step as well; where nobody does, it may be long."""
    pace = at_its_longest()
    assert pace.budget(decodes=0, beside=True) == SHARED_TOKENS_FIRST
    assert pace.budget(decodes=0) == 512
    pace.note(PREFILL_STEP_S_MAX * 32, chunk_tokens=512, decodes=0)
    assert pace.budget(decodes=0, beside=True) == CHUNK_TOKENS_MIN


def test_the_first_chunk_beside_streams_is_short() -> None:
    """A model of which nothing is known keeps nobody waiting; a quick one is soon at its longest."""
    pace = PrefillPace(chunk_tokens=512, shared_chunk_tokens=128)
    pace.note(0.05, chunk_tokens=0, decodes=4)
    lengths = []
    for _ in range(12):
        lengths.append(pace.budget(decodes=4))
        pace.note(0.06, chunk_tokens=lengths[-1], decodes=4)
    assert lengths[0] == SHARED_TOKENS_FIRST
    assert lengths[-1] == 128
