"""A step in lanes gives what it gives together, bit by bit, whoever has which tokens."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.adapters import fused_lanes, fused_pass
from services.worker.adapters.fused_lanes import HEAVIER_MAX, LANE_TOKENS, FusedLanes, Tokens, cut_of
from services.worker.adapters.fused_runner import FusedRunner
from services.worker.adapters.lane_thread import beside
from services.worker.core.batch import Batch, Chunk, Draw
from services.worker.core.revision import Quantization
from services.worker.core.sequence import Sampling
from services.worker.core.ways import FIRST_PAIRS
from tests.fakes import tiny_models
from tests.unit.worker.test_lean_forward import load

DRAW = Draw(Sampling(), 0, 0)
ROWS, PROMPT = 12, 9


@pytest.fixture
def runner(tmp_path: Path) -> FusedRunner:
    """A tiny model's runner, whose rows hold a prompt each."""
    tiny_models.save("llama", tmp_path)
    made = load(tmp_path, Quantization.INT8)
    assert isinstance(made, FusedRunner)
    chance = random.Random(1)  # noqa: S311 - it draws prompts
    for row in range(ROWS):
        ids = tuple(chance.randrange(3, 90) for _ in range(PROMPT))
        made.step(Batch(ROWS, 256, (), (Chunk(row, 0, ids, DRAW),), ()))
    return made


def lanes_of(runner: FusedRunner, threads: int = 2) -> FusedLanes:
    """Lanes over the runner's weights and rows."""
    return FusedLanes(runner._decoder, runner._cache, threads)  # type: ignore[arg-type]


def decodes(rows: int = ROWS) -> Tokens:
    """One token of each row."""
    return Tokens(list(range(3, 3 + rows)), list(range(rows)), [PROMPT] * rows, list(range(rows)))


def chunk_and_decodes() -> Tokens:
    """Five tokens of a prompt, the last of which is drawn, and one of each other row."""
    rows = [0] * 5 + list(range(1, 10))
    positions = list(range(PROMPT, PROMPT + 5)) + [PROMPT] * 9
    return Tokens(list(range(3, 17)), rows, positions, list(range(4, 14)))


@pytest.mark.parametrize("tokens", [decodes(), chunk_and_decodes()], ids=["decodes", "a chunk and decodes"])
@pytest.mark.parametrize("threads", [2, 3])
def test_lanes_give_what_one_pass_gives(runner: FusedRunner, tokens: Tokens, threads: int) -> None:
    """Each cut between two rows; in the same order, and again with what was kept of outliers."""
    lanes = lanes_of(runner, threads)
    cuts = [at for at in range(1, len(tokens.ids)) if tokens.rows[at - 1] != tokens.rows[at]]
    with torch.inference_mode():
        wanted = lanes.together(tokens)
        for cut in cuts:
            assert torch.equal(torch.cat(lanes.in_lanes(tokens, cut)), wanted)


def test_the_faster_way_is_taken_and_both_are_tried(
    runner: FusedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that says that lanes take half the time."""
    lanes, taken, now_s = lanes_of(runner), [], [0.0]
    together, in_lanes = lanes.together, lanes.in_lanes

    def slowly(tokens: Tokens) -> torch.Tensor:
        taken.append("together")
        now_s[0] += 2.0
        return together(tokens)

    def fast(tokens: Tokens, cut: int) -> list[torch.Tensor]:
        taken.append("lanes")
        now_s[0] += 1.0
        return in_lanes(tokens, cut)

    monkeypatch.setattr(lanes, "together", slowly)
    monkeypatch.setattr(lanes, "in_lanes", fast)
    monkeypatch.setattr(lanes, "_clock", lambda: now_s[0])
    with torch.inference_mode():
        wanted = together(decodes())
        found = [torch.cat(lanes.forward(decodes())) for _ in range(2 * FIRST_PAIRS + 4)]
        # Too few for lanes, whatever was found for more.
        lanes.forward(decodes(2 * LANE_TOKENS - 1))
    assert taken == [*["together", "lanes"] * FIRST_PAIRS, *["lanes"] * 4, "together"]
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("threads", [1, 4])
def test_one_thread_has_no_lanes_and_neither_have_many(runner: FusedRunner, threads: int) -> None:
    """Half of one is none; and a lane has one thread, while together they are four."""
    lanes = lanes_of(runner, threads)
    with torch.inference_mode():
        (found,) = lanes.forward(decodes())
        assert torch.equal(found, lanes.together(decodes()))
    assert 2 * lanes.bytes == lanes_of(runner, threads=2).bytes


def test_a_lane_that_cannot_begin_is_waited_for_by_none(
    runner: FusedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one, which has begun, is; and the next step of that size goes together."""
    lanes, begun = lanes_of(runner), []

    def short(lane: int, work: Any) -> Any:
        if lane:
            message = "can't start new thread"
            raise RuntimeError(message)
        promise = beside(lane, work)
        begun.append(promise)
        return promise

    with torch.inference_mode():
        wanted = lanes.together(decodes())
        lanes.forward(decodes())
        monkeypatch.setattr(fused_lanes, "beside", short)
        with pytest.raises(RuntimeError, match="thread"):
            lanes.forward(decodes())
        assert begun[0]._done.is_set()
        assert torch.equal(torch.cat(lanes.forward(decodes())), wanted)


def test_what_a_failed_lane_held_is_free_at_once(
    runner: FusedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision that ran out of memory is unloaded: the next one needs what it had."""
    lanes = lanes_of(runner)
    held = weakref.ref(lanes._passes[0]._kept[0])
    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patched, torch.inference_mode():
            patched.setattr(fused_pass._Space, "multiply", fail_to_multiply)
            with pytest.raises(MemoryError):
                lanes.in_lanes(decodes(), ROWS // 2)
        lanes.give_up()
        del lanes
        assert held() is None
    finally:
        gc.enable()


def fail_to_multiply(*_: object) -> torch.Tensor:
    """There is no memory for the sums."""
    raise MemoryError


def test_lanes_may_run_on_every_core_whatever_they_did() -> None:
    """OpenMP binds a thread that shares work with others; in a process of its own, where it binds at all."""
    code = (
        "import os, torch\n"
        "from services.worker.adapters.lane_thread import beside, bound_cores\n"
        "torch.zeros(1 << 20).add_(1)\n"
        "def work(): torch.zeros(1 << 20, dtype=torch.uint8).add_(1); return os.sched_getaffinity(0)\n"
        "found = [one.fetch() for one in [beside(lane, work) for lane in range(2)]]\n"
        "assert found == [bound_cores()] * 2, (found, bound_cores())\n"
        "assert torch.get_num_threads() == os.cpu_count()\n"
    )
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60.0)


def test_a_lane_that_fails_fails_the_step_when_both_have_ended(
    runner: FusedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes on with rows that are still written; the next step passes as before."""
    lanes = lanes_of(runner)
    first, second = lanes._passes
    ended = threading.Event()
    real = second.forward

    def late(*arguments: object) -> torch.Tensor:
        failed.wait(5.0)
        try:
            return real(*arguments)  # type: ignore[arg-type]
        finally:
            ended.set()

    failed = threading.Event()

    def fail(*_: object) -> torch.Tensor:
        failed.set()
        raise MemoryError

    with torch.inference_mode():
        wanted = lanes.together(decodes())
        with monkeypatch.context() as patched:
            patched.setattr(first, "forward", fail)
            patched.setattr(second, "forward", late)
            with pytest.raises(MemoryError):
                lanes.in_lanes(decodes(), ROWS // 2)
            assert ended.is_set()
        assert torch.equal(torch.cat(lanes.in_lanes(decodes(), ROWS // 2)), wanted)


@pytest.mark.parametrize(
    ("rows", "cut"),
    [
        (list(range(8)), 4),
        (list(range(9)), 4),
        ([0] * 5 + [1, 2, 3, 4, 5], 5),
        ([0] * 3 + list(range(1, 10)), 6),
        (list(range(7)), None),
        ([0] * 30, None),
        ([0] * 20 + list(range(1, 5)), None),
        ([0] * 8 + [1] * 4, None),
    ],
)
def test_a_cut_is_between_rows_and_even(rows: list[int], cut: int | None) -> None:
    """None where one row has nearly everything, or a lane would have too few tokens."""
    found = cut_of(rows, [1.0] * len(rows))
    assert found == cut or (found is not None and cut is not None and abs(found - cut) <= 1)


def test_long_rows_weigh_more() -> None:
    """Two tokens that attend to much are as much work as ten others."""
    costs = [5.0, 5.0, *[1.0] * 10]
    assert cut_of(list(range(12)), costs) == LANE_TOKENS
    assert cut_of(list(range(12)), [20.0, *[1.0] * 11]) is None
    assert HEAVIER_MAX > 0.5


def test_threads_beside_end_with_the_one_that_they_belong_to() -> None:
    """Otherwise each engine would leave some behind."""
    names: list[str] = []

    def owner() -> None:
        promises = [beside(lane, threading.current_thread) for lane in range(2)]
        for promise in promises:
            thread = promise.fetch()
            assert thread.daemon
            left.append(thread)
            names.append(thread.name)

    left: list[threading.Thread] = []
    one = threading.Thread(target=owner)
    one.start()
    one.join()
    for thread in left:
        thread.join(5.0)
    assert len(set(left)) == 2
    assert not any(thread.is_alive() for thread in left)
    assert names == ["lane", "lane"]
