"""Functions of vector instructions: what the assembler's operations compute, at the ends of rows as well."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable

import pytest
import torch

from services.worker.adapters.vector_code import F32, I32, I64, LANES, Lane, Value, Variable
from services.worker.adapters.vector_math import exponential
from services.worker.adapters.vector_program import Program, Sweep

COUNTS = [1, LANES - 1, LANES, LANES + 1, 5 * LANES + 7]


def run(body: Callable[[Sweep], None], *tensors: torch.Tensor, items: int = 1, threads: int = 1) -> None:
    """Compiles a function over the arrays `t0`, `t1` and so on, and calls it."""
    program = Program([f"t{number}" for number in range(len(tensors))], ["items", "threads"])
    program.function("run", body)
    frame = (ctypes.c_int64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    compiled = program.compile()
    compiled.long("run")(ctypes.addressof(frame), items, threads)


def mapped(count: int, verb: Callable[[Sweep, Value], Value]) -> Callable[[Sweep], None]:
    """A function that writes what a verb makes of each number of `t0` to `t1`."""

    def body(code: Sweep) -> None:
        source, target = code.array("t0", F32), code.array("t1", F32)
        code.each(count, lambda lane: lane.store(target, verb(code, lane.load(source, F32))))

    return body


@pytest.mark.parametrize("count", COUNTS)
def test_a_row_of_any_length_is_taken_to_its_end_and_no_further(count: int) -> None:
    """What lies behind a row stays as it was."""
    source, target = torch.randn(count), torch.full((count + LANES,), 7.0)
    run(mapped(count, lambda _, value: value * 2.0 + 1.0), source, target)
    assert torch.equal(target[:count], source * 2.0 + 1.0)
    assert torch.all(target[count:] == 7.0)


@pytest.mark.parametrize("count", COUNTS)
def test_what_is_computed_behind_a_rows_end_can_be_left_out(count: int) -> None:
    """A number that is none spoils the zeros there as well."""
    source, target = torch.full((count,), math.nan), torch.zeros(1)

    def body(code: Sweep) -> None:
        numbers, found = code.array("t0", F32), Variable(code, code.filled(0, I32))

        def add(lane: Lane) -> None:
            spoilt = lane.inside(lane.load(numbers, F32) * math.inf)
            found.set(found.get() + code.converted(spoilt.differs(spoilt), I32))

        code.each(count, add)
        # Each counts with minus one: that is what a true condition is as a number.
        code.array("t1", F32).put(0, code.converted(code.total(found.get()), F32))

    run(body, source, target)
    assert target.item() == -count


def test_the_exponential_is_right_to_a_few_units_in_the_last_place() -> None:
    """From the smallest power that has all its bits to the largest that is finite; beyond, those two."""
    source = torch.cat((torch.linspace(-87, 88, 100_003), torch.randn(1_000), torch.tensor([0.0, -0.0])))
    target = torch.empty_like(source)
    run(mapped(len(source), exponential), source, target)
    wanted = source.double().exp()
    assert ((target.double() - wanted) / wanted).abs().max() < 3e-7
    ends = torch.tensor([-1e30, -math.inf, 1e30, math.inf, math.nan] + [0.0] * 11)
    found = torch.empty_like(ends)
    run(mapped(len(ends), exponential), ends, found)
    assert torch.all(found[:2] < 1e-37)
    assert torch.all(found[2:4] > 1e38)
    assert torch.all(found[:4].isfinite())
    assert found[4].isnan()
    assert torch.all(found[5:] == 1.0)


@pytest.mark.parametrize("count", COUNTS)
def test_sums_and_peaks_of_a_row(count: int) -> None:
    """Whole numbers, whose sum is exact in any order; the peak may be the last."""
    source = torch.arange(1, count + 1).float()

    def body(code: Sweep) -> None:
        numbers, total = code.array("t0", F32), Variable(code, code.filled(0.0))
        peak = Variable(code, code.filled(0.0))

        def add(lane: Lane) -> None:
            found = lane.load(numbers, F32)
            total.set(total.get() + found)
            peak.set(code.largest(found, peak.get()))

        code.each(count, add)
        code.array("t1", F32).put(0, code.total(total.get()))
        code.array("t1", F32).put(1, code.peak(peak.get()))

    target = torch.empty(2)
    run(body, source, target)
    assert target.tolist() == [count * (count + 1) / 2, count]


def test_numbers_change_their_type() -> None:
    """To whole numbers, to bits and back."""
    source = torch.tensor([1.5, 2.5, -1.5, 0.49, 127.0, -126.6] + [0.0] * (LANES - 6))

    def body(code: Sweep) -> None:
        numbers, whole, bits = code.array("t0", F32), code.array("t1", I32), code.array("t2", I32)

        def write(lane: Lane) -> None:
            found = lane.load(numbers, F32)
            lane.store(whole, code.converted(code.rounded(found), I32))
            lane.store(bits, code.reread(found, I32))

        code.each(LANES, write)

    whole, bits = torch.empty(LANES, dtype=torch.int32), torch.empty(LANES, dtype=torch.int32)
    run(body, source, whole, bits)
    assert whole[:6].tolist() == [2, 2, -2, 0, 127, -127]
    assert torch.equal(bits, source.view(torch.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 1_000])
def test_a_sweep_takes_each_item_once(items: int, threads: int) -> None:
    """However many threads share it; the second sweep begins when the first has ended."""

    def body(code: Sweep) -> None:
        count, share = code.argument("items"), code.argument("threads")

        def add(inside: Sweep, item: Value) -> None:
            found = inside.array("t0", I64)
            found.put(item, found.get(item) + 1)

        def copy(inside: Sweep, item: Value) -> None:
            mirrored = inside.argument("items") - item - 1
            inside.array("t1", I64).put(item, inside.array("t0", I64).get(mirrored))

        code.sweep(count, share, add)
        code.sweep(count, share, copy)

    first, second = torch.zeros(items + 1, dtype=torch.long), torch.zeros(items + 1, dtype=torch.long)
    run(body, first, second, items=items, threads=threads)
    assert first.tolist() == second.tolist() == [1] * items + [0]


def test_a_long_call_lets_other_threads_run() -> None:
    """And a brief one does not: it is over before anybody notices."""

    def body(code: Sweep) -> None:
        numbers = code.array("t0", I64)
        with code.loop(0, code.argument("items")):
            # A square root after the other, so that nothing is left out.
            numbers.put(0, code.converted(code.root(code.converted(numbers.get(0), F32)), I64) + 2)

    program = Program(["t0"], ["items"])
    program.function("run", body)
    compiled, place = program.compile(), torch.ones(1, dtype=torch.long)
    frame = (ctypes.c_int64 * 1)(place.data_ptr())
    ran: list[int] = []
    over = threading.Event()

    def count() -> None:
        while not over.wait(0.001):
            ran.append(1)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        compiled.long("run")(ctypes.addressof(frame), 20_000_000)
        during = len(ran)
    finally:
        over.set()
        thread.join()
    assert during > 3
