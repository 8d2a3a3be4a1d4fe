"""What gateways count of each revision: ends that are the worker's doing, and first tokens."""

from __future__ import annotations

import pytest

from services.common.ttft_buckets import BUCKETS, bucket_of
from services.gateway.adapters.counted_workers import CountedWorkerPool
from services.gateway.core.attempts import Loss, Output, RefusalReason, WorkOrder
from services.gateway.core.breaker import Verdict
from services.gateway.core.events import FinishReason
from services.gateway.core.params import SamplingParams
from services.gateway.core.ports import Attempt, AttemptSink
from services.gateway.core.tallies import REVISIONS_MAX, RevisionTally, Tallies
from tests.fakes.controller_ports import FakeClock
from tests.fakes.gateway_ports import FakeWorkerPool


class Sink:
    """Who is told of the attempts, in words."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def output(self, output: Output) -> None:
        """See `AttemptSink.output`."""
        self.heard.append(f"output {output.index}")

    def refused(self, reason: RefusalReason, message: str) -> None:
        """See `AttemptSink.refused`."""
        self.heard.append(f"refused {reason} {message}")

    def lost(self, cause: str, loss: Loss) -> None:
        """See `AttemptSink.lost`."""
        self.heard.append(f"lost {loss} {cause}")


class World:
    """A counted pool over one that does nothing by itself."""

    def __init__(self) -> None:
        self.tallies, self.clock, self.fake, self.sink = Tallies(), FakeClock(), FakeWorkerPool(), Sink()
        self.pool = CountedWorkerPool(self.fake, self.tallies, self.clock)

    def start(self, revision: str = "r1", worker: str = "a", *, emitted: int = 0) -> Attempt:
        """Starts an attempt; it is number `len(attempts)` below."""
        number = len(self.fake.attempts)
        order = WorkOrder(
            job_id=f"j{number}",
            attempt=1,
            request_id="q",
            model="m",
            revision=revision,
            epoch=1,
            prompt_ids=(1,),
            emitted=((7,) * emitted,),
            max_tokens=9,
            sampling=SamplingParams(),
            credit_tokens=8,
        )
        return self.pool.start(worker, "h:1", order, self.sink)

    def below(self, number: int = -1) -> AttemptSink:
        """What the worker says to."""
        return self.fake.attempts[number].sink

    def counts(self, revision: str = "r1") -> tuple[int, int, int]:
        """Finished, failed, and first tokens."""
        for tally in self.tallies:
            if tally.revision == revision:
                return tally.finished, tally.failed, sum(tally.ttft)
        return 0, 0, 0


@pytest.fixture
def world() -> World:
    """An empty one."""
    return World()


def test_a_whole_answer(world: World) -> None:
    """Its first token is timed once, from the order on; everything is told on."""
    world.start()
    world.clock.seconds += 0.3
    world.below().output(Output(0, (1,)))
    world.clock.seconds += 5.0
    world.below().output(Output(1, (2,)))
    world.below().output(Output(2, (), FinishReason.STOP))
    expected = [0] * BUCKETS
    expected[bucket_of(0.3)] = 1
    assert list(world.tallies) == [RevisionTally("m", "r1", 1, 0, expected)]
    assert world.sink.heard == ["output 0", "output 1", "output 2"]


def test_an_attempt_of_several_sequences_is_one(world: World) -> None:
    """It has finished with the last of them, and once."""
    world.start()
    world.below().output(Output(0, (1,), FinishReason.STOP, others=1))
    assert world.counts() == (0, 0, 1)
    world.below().output(Output(0, (1,), FinishReason.STOP, sequence=1))
    assert world.counts() == (1, 0, 1)


async def test_what_is_nobodys_fault(world: World) -> None:
    """Refusals, cancellations and the gateway's own absence; a text that met its stop string is whole."""
    for reason in RefusalReason:
        world.start()
        world.below().refused(reason, "no")
    world.start().cancel()
    world.start()
    world.below().lost("stood still", Loss.ABSENCE)
    assert world.counts() == (0, 0, 0)
    world.start().cancel(Verdict.SUCCESS)
    assert world.counts() == (1, 0, 0)
    assert world.fake.attempts[-1].verdict is Verdict.SUCCESS


async def test_what_is_the_workers_doing(world: World) -> None:
    """Each job that it gives up counts, and each that it answered against the protocol."""
    for _ in range(3):
        world.start()
    for number in range(3):
        world.below(number).lost("ended", Loss.JOB)
    world.start().cancel(Verdict.FAILURE)
    assert world.counts() == (0, 4, 0)
    assert world.sink.heard == ["lost job ended"] * 3


@pytest.mark.parametrize("loss", [Loss.PROCESS, Loss.SILENCE])
def test_a_lost_worker_counts_once(world: World, loss: Loss) -> None:
    """Once for each revision that it ran; workers that live, and what comes later, are not excused."""
    for revision, worker in (("r1", "a"), ("r1", "a"), ("r2", "a"), ("r2", "a"), ("r1", "b")):
        world.start(revision, worker)
    for number in range(4):
        world.below(number).lost("gone", loss)
    assert (world.counts("r1"), world.counts("r2")) == ((0, 1, 0), (0, 1, 0))
    world.below(4).lost("ended", Loss.JOB)
    world.start("r1", "a")
    world.below().lost("gone", loss)
    assert (world.counts("r1"), world.counts("r2")) == ((0, 3, 0), (0, 1, 0))


def test_a_text_that_goes_on_elsewhere_has_its_first_token(world: World) -> None:
    """How soon the second worker goes on is not what its revision is judged by."""
    world.start(emitted=3)
    world.below().output(Output(3, (1,), FinishReason.LENGTH))
    assert world.counts() == (1, 0, 0)


async def test_an_end_counts_once(world: World) -> None:
    """What comes after it is told on, and not counted."""
    attempt = world.start()
    world.below().output(Output(0, (1,), FinishReason.STOP))
    attempt.cancel(Verdict.FAILURE)
    world.below().lost("gone", Loss.PROCESS)
    assert world.counts() == (1, 0, 1)


def test_tallies_are_bounded(world: World) -> None:
    """The revision that was used longest ago makes room."""
    for number in range(REVISIONS_MAX):
        world.tallies.count_finished("m", f"r{number}")
    world.tallies.count_failed("m", "r0")
    world.tallies.count_finished("m", "new")
    names = [tally.revision for tally in world.tallies]
    assert len(names) == REVISIONS_MAX
    assert "r1" not in names
    assert names[-2:] == ["r0", "new"]
