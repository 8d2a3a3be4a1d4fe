"""What a bench reads of the workers' engines, and what two readings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from bench.engine_work import Count, nobody, read, streams_between
from services.worker.adapters.prometheus_engine import EngineCollector
from services.worker.core.revision import Residency
from services.worker.core.stepper import Pulse
from tests.fixtures.proxy import name_a_dead_proxy


@contextmanager
def metrics_of(pulses: list[Pulse]) -> Iterator[str]:
    """A worker's metrics, as of the last of `pulses`; the address."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: pulses[-1], Residency()))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def test_an_engine_is_read_from_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count, by the names of a scrape, without a proxy; one that is not there is not told."""
    name_a_dead_proxy(monkeypatch)
    pulses = [Pulse(10, 300, 3, 29, MappingProxyType({}), 0.5)]
    with metrics_of(pulses) as address:
        before = await read([address, "127.0.0.1:9"])
        pulses.append(Pulse(14, 420, 3, 29, MappingProxyType({}), 0.9))
        after = await read([address])
    assert before.keys() == after.keys() == {address}
    old, new = before[address], after[address]
    assert (old.steps, old.tokens, old.step_s, new.steps, new.tokens, new.step_s) == (
        10,
        300,
        0.5,
        14,
        420,
        0.9,
    )
    assert old.at_s <= new.at_s
    assert await read(nobody()) == {}


def test_streams_are_those_of_a_step_for_as_long_as_there_is_one() -> None:
    """Thirty tokens a step, and a step for four fifths of the time; engines add up."""
    before, after = Count(100.0, 10, 300, 0.5), Count(110.0, 20, 600, 8.5)
    assert streams_between({"a": before}, {"a": after}) == 24.0
    assert streams_between({"a": before, "b": before}, {"a": after, "b": after}) == 48.0
    assert streams_between({"a": before}, {"a": Count(110.0, 10, 300, 0.5)}) == 0.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({"a": Count(0.0, 1, 1, 0.1)}, {}),
        ({"a": Count(0.0, 1, 1, 0.1)}, {"b": Count(1.0, 1, 1, 0.1)}),
        ({"a": Count(0.0, 5, 50, 0.1)}, {"a": Count(1.0, 1, 1, 0.1)}),
    ],
)
def test_what_is_not_known_throughout_is_not_told(before: dict[str, Count], after: dict[str, Count]) -> None:
    """No engine, one that went, another one, and one that was started anew."""
    assert streams_between(before, after) is None
