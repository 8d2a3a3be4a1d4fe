"""The sequences of an answer, its outbox, and what its log brings back."""

from __future__ import annotations

import json
from dataclasses import replace

from services.gateway.adapters.log_entries import read_entry, write_entry
from services.gateway.core.answers import Answers
from services.gateway.core.attempts import Output
from services.gateway.core.detokenizer import Piece
from services.gateway.core.events import Chunk, Event, Finished, FinishReason, Started, Usage
from services.gateway.core.jobs import Band
from services.gateway.core.log import Entry
from services.gateway.core.params import GenerationJob, GenerationParams, SamplingParams
from services.gateway.dispatcher.outbox import Outbox
from tests.fakes.gateway_ports import FakeTokenizer, grant

STARTED = Started("q", "m", "r1", "w1", 1, 0.0)


def answers(n: int = 3, stop: tuple[str, ...] = ()) -> Answers:
    """The answer to a job of so many sequences, of ten tokens each at most."""
    job = GenerationJob(
        job_id="j",
        request_id="q",
        tenant="alice",
        model="m",
        prompt_ids=(1, 2, 3),
        params=GenerationParams(10, SamplingParams(seed=1), stop, n=n),
        band=Band.INTERACTIVE,
        timeout_s=9.0,
        submission="s",
        words=FakeTokenizer(),
    )
    return Answers(job, 0.0)


def ids(text: str) -> tuple[int, ...]:
    """The fake tokenizer's ids of a text."""
    return tuple(map(ord, text))


def chunk(sequence: int, index: int, text: str) -> Chunk:
    """A chunk whose tokens are its characters."""
    return Chunk(index, text, ids(text), (), sequence)


def log_of(*events: Started | Chunk | Finished) -> list[Entry]:
    """A log as the store gives it back."""
    return [read_entry(write_entry(Entry(event, 0.5 * at))) for at, event in enumerate(events)]


def test_a_log_brings_each_sequence_back() -> None:
    """One has text, one has ended, one has not begun: a worker is asked for just the rest."""
    ended = Finished(FinishReason.STOP, usage=Usage(0, 0, 2), sequence=2, is_last=False)
    log = log_of(STARTED, chunk(0, 0, "ab"), chunk(2, 0, "xy"), chunk(0, 2, "c"), ended)
    found = answers()
    assert found.restore(log)
    order = found.work_order(grant("n"), 5, 8)
    assert order.emitted == (ids("abc"), (), ids("xy"))
    assert order.ended == {2}
    assert order.open == {0, 1}
    assert found.progress == 5 + 1
    assert not found.continues(Output(2, ids("z"), sequence=2))
    assert found.continues(Output(3, ids("d"), sequence=0))
    assert not found.continues(Output(0, ids("d"), sequence=3))


def test_a_log_tells_what_a_cache_had_of_the_prompt() -> None:
    """With its first text, or with an end that has no tokens before it."""
    ended = Finished(FinishReason.STOP, usage=Usage(3, 2, 0), sequence=0, is_last=False)
    first = Entry(chunk(0, 0, "ab"), 0.0, 2)
    for log in (log_of(STARTED, ended), [first, *log_of(chunk(0, 2, "c"))]):
        found = answers(2)
        assert found.restore(log)
        assert found.usage.cached_prompt_tokens == 2


def test_text_that_an_end_let_go_is_part_of_the_log() -> None:
    """What could have been the beginning of a stop string came out with the end: the log is exact."""
    ended = Finished(FinishReason.STOP, sequence=1, is_last=False)
    held = Chunk(0, "say en", ids("say en"), (), 1)
    assert answers(stop=("end",)).restore(log_of(STARTED, held, ended))
    assert not answers(stop=("end",)).restore(log_of(STARTED, held)), "without the end it is held back still"


def test_a_log_tells_how_many_workers_were_used_up() -> None:
    """Not how often the request was handed on; an earlier version's log does not tell the two apart."""
    started = replace(STARTED, attempt=4, failures=1)
    text = write_entry(Entry(started))
    assert read_entry(text).event == started
    fields = json.loads(text)
    del fields["failures"]
    assert read_entry(json.dumps(fields)).event == replace(started, failures=3)


def test_a_log_with_a_gap_is_not_continued() -> None:
    """Each sequence counts by itself."""
    assert not answers().restore(log_of(STARTED, chunk(0, 0, "ab"), chunk(1, 2, "c")))


def test_a_sequence_at_its_limit_is_complete() -> None:
    """One at its tokens and one at its stop string are, though their ends were not told."""
    found = answers(stop=("!",))
    stopped = Chunk(0, "ab", ids("ab!"), (), 2)
    assert found.restore(log_of(STARTED, chunk(0, 0, "x" * 10), stopped))
    assert list(found.complete) == [0, 2]
    assert found.end(2, 1.0) == Finished(
        FinishReason.STOP, "!", Usage(0, 0, 3), found[2].finished(1.0, is_last=False).timings, 2, False
    )
    assert list(found.complete) == [0]


def test_the_last_end_is_the_requests() -> None:
    """The usage of all is the prompt once, and each sequence's tokens."""
    found = answers(2)
    for sequence, text in enumerate(("abc", "d")):
        found[sequence].note_cached(2)
        found[sequence].push(Output(0, ids(text), sequence=sequence), 1.0)
    assert not found.end(1, 2.0).is_last
    last = found.finish(3.0)
    assert (last.sequence, last.is_last, last.usage) == (0, True, Usage(3, 2, 3))
    assert (found.usage, found.used_tokens) == (Usage(3, 2, 4), 7)


def drained(outbox: Outbox) -> list[Event]:
    """All that waits."""
    found = []
    while outbox:
        found.append(outbox.take())
    return found


def test_what_waits_is_merged_by_sequence() -> None:
    """Two sequences that take turns wait as two chunks; an end in between keeps what follows behind it."""
    outbox = Outbox(100, 3)
    for at in range(4):
        for sequence in (0, 1):
            outbox.put_piece(Piece("ab"[sequence], ids("ab"[sequence])), at, sequence)
    outbox.put(Finished(FinishReason.STOP, sequence=1, is_last=False))
    outbox.put(Finished(FinishReason.STOP, sequence=2, is_last=False))
    outbox.put_piece(Piece("a", ids("a")), 4, 0)
    first, second, *ends, third = drained(outbox)
    assert (first, second) == (chunk(0, 0, "aaaa"), chunk(1, 0, "bbbb"))
    assert len(ends) == 2
    assert third == chunk(0, 4, "a")


def test_credit_is_renewed_for_what_was_read_of_a_sequence() -> None:
    """A quarter of the window, for that one alone; a new attempt gets the smallest, and is owed the rest."""
    outbox = Outbox(8, 2)
    outbox.put_piece(Piece("abcdef", ids("abcdef")), 0, 0)
    outbox.put_piece(Piece("x", ids("x")), 0, 1)
    drained(outbox)
    assert outbox.acknowledge() == [(0, 6)]
    outbox.put_piece(Piece("ghij", ids("ghij")), 6, 0)
    assert outbox.first_credit_tokens() == 4
    assert outbox.acknowledge() == [(1, 4)], "it may send eight, and was given four"
    drained(outbox)
    assert outbox.acknowledge() == [(0, 4)]
