"""The figures of a load, on traces whose figures are known."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench import load as bench
from bench.load_chart import draw
from bench.load_figures import Spread, figures, jain, spread
from bench.load_http import HttpCaller
from bench.load_plan import Ask, Load, Tenant, ask_of, tenant
from bench.load_rounds import order, summaries
from bench.load_steps import Crowd
from bench.load_trace import Fate, Trace

WINDOW_S = (10.0, 20.0)
CHANCE = Random(1)  # noqa: S311 - it draws prompts and arrivals
ASK = Ask(Tenant("a"), (100, 101), 8, 2.5)


def answered(name: str, began_s: float, *arrivals: tuple[float, int], fate: Fate = Fate.FINISHED) -> Trace:
    """A request whose tokens came at known times."""
    trace = Trace(name, began_s, began_s, arrivals=list(arrivals))
    trace.end(arrivals[-1][0], fate)
    return trace


def test_tokens_count_by_their_arrival_and_only_if_they_are_good() -> None:
    """What came outside the window, failed or missed its deadline is no goodput; what was cut is."""
    late = Trace("b", 11.0, 11.0, deadline_s=2.0, arrivals=[(12.0, 50)])
    late.end(13.5, Fate.FINISHED)
    traces = [
        answered("a", 9.0, (9.5, 7), (10.5, 20), (20.0, 9)),
        answered("b", 12.0, (13.0, 10), fate=Fate.CUT),
        answered("b", 12.0, (13.0, 40), fate=Fate.FAILED),
        late,
    ]
    found = figures(traces, {"a": 1.0, "b": 1.0}, WINDOW_S)
    assert found.goodput_tokens_per_s == 3.0
    assert found.tenant_tokens == {"a": 20, "b": 10}
    assert found.missed_deadlines == 1
    assert found.requests == {"cut": 1, "finished": 0, "refused": 0, "missed": 1, "failed": 1}


def test_latencies_are_those_of_the_window() -> None:
    """TTFT counts from the first wish; a message of three tokens is three even gaps."""
    trace = answered("a", 11.0, (12.0, 1), (12.6, 3), (20.5, 1))
    trace.wished_s = 10.5
    before = answered("a", 1.0, (2.0, 1), (9.9, 1))
    found = figures([trace, before], {"a": 1.0}, WINDOW_S)
    assert found.ttft_ms == Spread(1_500.0, 1_500.0, 1)
    assert found.itl_ms == Spread(200.0, 200.0, 3)


def test_refusals_are_counted_with_how_long_they_took() -> None:
    """Half of four were refused, one of the two with a time to come back."""
    traces = [answered("a", 11.0, (12.0, 1)), answered("a", 12.0, (13.0, 1))]
    for took_s, retry_after_s in ((0.01, 2.0), (0.03, None)):
        refused = Trace("a", 15.0, 15.0)
        refused.end(15.0 + took_s, Fate.REFUSED, retry_after_s)
        traces.append(refused)
    found = figures(traces, {"a": 1.0}, WINDOW_S)
    assert (found.shed_rate, found.refusals_with_retry_after) == (0.5, 0.5)
    assert found.refusal_ms == Spread(10.0, 30.0, 2)


def test_the_error_of_a_wait_is_that_of_its_first_estimate() -> None:
    """It was told 3 s at 11 and 1 s at 12, and began at 15: a second too few."""
    trace = Trace("a", 11.0, 11.0)
    trace.wait_told(11.0, 3.0)
    trace.wait_told(12.0, 1.0)
    trace.started_s = 15.0
    assert figures([trace], {"a": 1.0}, WINDOW_S).wait_error_s == Spread(1.0, 1.0, 1)


def test_fair_is_by_weight() -> None:
    """1:3 is fair for weights 1 and 3; for equal weights it is not, and nothing of one is 1/n."""
    traces = [answered("a", 11.0, (12.0, 10)), answered("b", 11.0, (12.0, 30))]
    assert figures(traces, {"a": 1.0, "b": 3.0}, WINDOW_S).jain == 1.0
    assert figures(traces, {"a": 1.0, "b": 1.0}, WINDOW_S).jain == 0.8
    assert jain([5.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([0.0, 0.0]) == 1.0
    assert spread([]) == Spread(None, None, 0)


def test_tenants_are_read_and_share_the_clients() -> None:
    """Clients are dealt in proportion, from the first on; each prompt is of its length and its own."""
    load = Load(tenants=(tenant("a"), tenant("b:3:batch:3")), prompt_tokens=5)
    assert load.tenants == (Tenant("a"), Tenant("b", 3, "batch", 3))
    assert [one.name for one in load.crowd(8)].count("a") == 2
    assert [one.name for one in load.crowd(4)].count("a") == 1
    first, second = (ask_of(load, load.tenants[0], CHANCE) for _ in range(2))
    assert len(first.prompt_ids) == 5
    assert first.prompt_ids != second.prompt_ids
    for text in ("", ":2", "a:0", "a:101", "a:x", "a:1:urgent", "a:1:batch:0", "a:1:batch:1:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME"):
            tenant(text)


def test_rounds_hold_every_number_once_and_are_mixed() -> None:
    """One round is as it was asked for; of several no two neighbours are always the same."""
    assert order([4, 1, 4], 1, CHANCE) == [4, 1, 4]
    sizes = order([50, 100, 200, 400], 20, CHANCE)
    rounds = [sizes[at : at + 4] for at in range(0, 80, 4)]
    assert all(sorted(one) == [50, 100, 200, 400] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5


def test_rounds_tell_what_their_medians_are_worth() -> None:
    """Drift that all numbers of clients share does not widen the interval; a round that strays does."""
    steady = [{8: 100.0 + drift, 16: 97.0 + drift} for drift in (0.0, 1.0, 2.0, -1.0, -2.0)]
    eight, sixteen = summaries(steady, CHANCE)
    assert (eight.clients, eight.median, eight.share, eight.interval) == (8, 100.0, 1.0, (1.0, 1.0))
    assert eight.deviation == pytest.approx(1.58, abs=0.01)
    assert sixteen.share == 0.97
    assert sixteen.interval[1] - sixteen.interval[0] < 0.002
    strayed = [*steady[:3], {8: 99.0, 16: 60.0}, {8: 98.0, 16: 60.0}]
    assert summaries(strayed, CHANCE)[1].interval[0] < 0.7
    assert [one.deviation for one in summaries(steady[:1], CHANCE)] == [0.0, 0.0]
    # A round that was slow for all says nothing of any; medians of each number alone would differ.
    halved = [{8: 100.0, 16: 98.0}, {8: 60.0, 16: 58.8}, {8: 50.0, 16: 49.0}]
    assert [round(one.share, 6) for one in summaries(halved, CHANCE)] == [1.0, 0.98]


def test_all_rounds_of_a_number_of_clients_are_one_line() -> None:
    """Tokens/s, and what does not drift; steps without the queue and arrivals are no part of it."""
    steps: list[dict[str, Any]] = [
        {
            "clients": clients,
            "queue": True,
            "goodput_tokens_per_s": 10.0 * clients,
            "engine_streams": 2.0 * clients,
            "cores": {"worker": 1.5},
        }
        for clients in (8, 16, 16, 8)
    ]
    steps += [{"clients": 8, "queue": False}, {"clients": None, "queue": True}]
    arguments = argparse.Namespace(clients=[8, 16], rounds=2)
    summed = [bench.summary_of(arguments, steps, measured)[0] for measured in bench.MEASURED.values()]
    assert bench.line_of_rounds(*summed) == (
        "8 clients, all rounds: 80 tokens/s at the median, deviation 0, 50.0% (50.0% to 50.0%) of the highest"
        "; streams in a step 16.0, 50.0% (50.0% to 50.0%)"
        "; workers had 1.50 cores, 100.0% (100.0% to 100.0%)"
    )


def test_mixed_answers_are_as_long_in_the_mean() -> None:
    """Half to three halves, each as likely; equal ones otherwise."""
    load = Load(answer_tokens=32, mixed=True)
    lengths = [ask_of(load, load.tenants[0], CHANCE).answer_tokens for _ in range(2_000)]
    assert (min(lengths), max(lengths)) == (16, 48)
    assert 31 < sum(lengths) / len(lengths) < 33
    alike = Load(answer_tokens=32)
    assert {ask_of(alike, alike.tenants[0], CHANCE).answer_tokens for _ in range(9)} == {32}
    shortest = Load(answer_tokens=1, mixed=True)
    assert ask_of(shortest, shortest.tenants[0], CHANCE).answer_tokens == 1


class RefusingCaller:
    """Refuses once with a delay, then answers one token at a time, at once."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        self.asks.append(ask)
        await asyncio.sleep(0.01)
        now_s = asyncio.get_running_loop().time()
        if len(self.asks) == 1:
            trace.end(now_s, Fate.REFUSED, 0.02)
        else:
            trace.arrivals.append((now_s, 1))
            trace.end(now_s, Fate.FINISHED)


async def test_a_refused_client_comes_back_with_the_same_wish() -> None:
    """The same prompt is asked again after the delay, and its wait counts from the first attempt."""
    caller = RefusingCaller()
    load = Load(duration_s=0.2, warmup_s=0.0)
    step = await Crowd(caller, load, CHANCE).closed_loop(1, lambda _: None)
    first, second, third = step.traces[:3]
    assert (first.fate, second.fate) == (Fate.REFUSED, Fate.FINISHED)
    assert second.wished_s == first.wished_s <= second.began_s - 0.02
    assert third.wished_s > second.wished_s
    assert caller.asks[0] is caller.asks[1]
    assert step.traces[-1].fate in {Fate.CUT, Fate.FINISHED}


async def test_arrivals_do_not_wait_for_answers() -> None:
    """At 200 a second for 0.3 s far more are under way at once than one; their number is about the rate's."""
    entered: list[Ask] = []

    class Silent:
        async def ask(self, ask: Ask, trace: Trace) -> None:
            del trace
            entered.append(ask)
            await asyncio.Event().wait()

    load = Load(duration_s=0.3, warmup_s=0.0)
    step = await Crowd(Silent(), load, CHANCE).open_loop(200.0, lambda _: None)
    assert 20 <= len(entered) <= 120
    assert {trace.fate for trace in step.traces} == {Fate.CUT}


class Patient:
    """Starts the first of its requests at once, and answers none."""

    def __init__(self, started: int) -> None:
        self.asked: list[str] = []
        self.left = 0
        self._started = started

    async def ask(self, ask: Ask, trace: Trace) -> None:
        """See `Caller`."""
        if len(self.asked) < self._started:
            trace.started_s = trace.began_s
        self.asked.append(ask.tenant.name)
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1


async def test_a_crowd_that_goes_on_grows_and_shrinks_without_beginning_anew() -> None:
    """Whoever is served stays; of those who wait, as many leave or come as it takes, of each tenant."""
    caller = Patient(started=1)
    load = Load(tenants=(Tenant("a"), Tenant("b", clients=3)), duration_s=0.01, warmup_s=0.0)
    crowd = Crowd(caller, load, CHANCE)
    first = await crowd.go_on(8, lambda _: None)
    assert (caller.asked.count("a"), caller.asked.count("b"), caller.left) == (2, 6, 0)
    less = await crowd.go_on(4, lambda _: None)
    assert (len(caller.asked), caller.left, len(less.traces)) == (8, 4, 8)
    served = [trace for trace in first.traces if trace.started_s is not None]
    more = await crowd.go_on(12, lambda _: None)
    assert (len(caller.asked), caller.left, len(more.traces)) == (16, 4, 12)
    assert all(trace in more.traces for trace in served)
    await crowd.leave()
    assert caller.left == len(caller.asked) == 16


async def test_a_defect_of_a_client_ends_the_measurement() -> None:
    """It is raised, not counted as silence."""

    class Broken:
        async def ask(self, ask: Ask, trace: Trace) -> None:
            del ask, trace
            raise RuntimeError("a defect")

    load = Load(duration_s=0.01, warmup_s=0.0)
    with pytest.raises(RuntimeError, match="a defect"):
        await Crowd(Broken(), load, CHANCE).closed_loop(1, lambda _: None)


@contextlib.asynccontextmanager
async def http_server(reply: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers every request with the same bytes."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        heard.append(head + await reader.readexactly(length))
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}", heard


def chunked(*pieces: bytes) -> bytes:
    """A reply of events, in chunks that need not end where events do."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


async def asked(reply: bytes) -> tuple[Trace, bytes]:
    """The trace of a request that is answered like that, and what the server heard."""
    trace = Trace("a", 0.0, 0.0)
    async with http_server(reply) as (address, heard):
        await HttpCaller(address, {"a": "secret-token"}).ask(ASK, trace)
    return trace, heard[0]


async def test_a_stream_of_events_is_read_over_http() -> None:
    """Tokens, wait and start are noted however the body is cut; the request says what was asked."""
    events = (
        b'id: 1\nevent: queued\ndata: {"queued":{"position":2,"estimated_wait_s":1.5}}\n\n: waiting\n\n'
        b'data: {"started":{"attempt":1}}\n\ndata: {"chunk":{"token_ids":[5,6,7]}}\n\n'
        b'data: {"chunk":{"token_ids":[8]}}\n\ndata: {"finished":{"stop_text":""}}\n\n'
    )
    trace, heard = await asked(chunked(events[:70], events[70:200], events[200:]))
    assert (trace.fate, trace.tokens, len(trace.arrivals)) == (Fate.FINISHED, 4, 2)
    assert trace.told_wait is not None
    assert trace.told_wait[1] == 1.5
    assert trace.started_s is not None
    head, _, body = heard.partition(b"\r\n\r\n")
    assert b"authorization: Bearer secret-token" in head
    assert b"x-interlock-deadline: 2.5" in head
    assert json.loads(body) == {
        "tokens": [100, 101], "max_tokens": 8, "priority": "interactive", "stream": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "fate", "retry_after_s"),
    [
        (b"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\ncontent-length: 0\r\n\r\n", Fate.REFUSED, 3.0),
        (b"HTTP/1.1 504 Late\r\ncontent-length: 0\r\n\r\n", Fate.MISSED, None),
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", Fate.FAILED, None),
        (chunked(b'data: {"chunk":{"token_ids":[1]}}\n\n'), Fate.FAILED, None),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\n", Fate.FAILED, None),
        (
            chunked(b'data: {"error":{"code":"RESOURCE_EXHAUSTED","retry_after_ms":250}}\n\n'),
            Fate.REFUSED,
            0.25,
        ),
        (
            chunked(b'data: {"started":{}}\n\ndata: {"error":{"code":"UNAVAILABLE"}}\n\n'),
            Fate.FAILED,
            None,
        ),
    ],
    ids=["refused", "late", "unauthenticated", "unfinished", "torn", "refused in-band", "lost"],
)
async def test_a_failure_over_http_is_told_apart(
    reply: bytes, fate: Fate, retry_after_s: float | None
) -> None:
    """By the status before the stream, by the error event in it, by its absence at the end."""
    trace, _ = await asked(reply)
    assert (trace.fate, trace.retry_after_s) == (fate, retry_after_s)


def test_a_chart_is_a_png_of_both_ways(tmp_path: Path) -> None:
    """Steps without a first token leave a gap rather than break it."""
    pytest.importorskip("matplotlib")
    steps = [
        {"clients": clients, "queue": queue, "goodput_tokens_per_s": 9.0, "shed_rate": 0.0,
         "ttft_ms": {"p50": None if clients == 8 else 5.0}}
        for clients in (1, 8) for queue in (True, False)
    ]  # fmt: skip
    draw(steps, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_mesh_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty home is told from a mesh."""
    monkeypatch.setenv("INTERLOCK_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("INTERLOCK_JWT_SECRET", "x" * 32)
    assert bench.main(["--clients", "1"]) == 1
    assert "--up" in capsys.readouterr().err


def test_continuous_is_for_clients_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Arrivals, and clients without the queue, cannot go on from step to step."""
    for more in (["--rate", "5"], ["--without-queue"]):
        with pytest.raises(SystemExit):
            bench.main(["--clients", "4", "8", "--continuous", *more])
    assert "--continuous" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", ["0", "2"])
def test_rounds_are_of_different_numbers(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None at all, or the same number twice in each, cannot be told apart afterwards."""
    with pytest.raises(SystemExit):
        bench.main(["--clients", "4", "4", "--rounds", rounds])
    assert "--rounds" in capsys.readouterr().err
