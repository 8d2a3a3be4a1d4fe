"""`interlock bench`: what can be measured, and how a measurement gets its arguments."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from services.cli import bench
from services.cli.__main__ import main

Capture = pytest.CaptureFixture[str]
BENCH_DIRECTORY = Path(__file__).resolve().parents[3] / "bench"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_measurements(arguments: list[str], capsys: Capture) -> None:
    """Each has a line of its own that says what it measures."""
    assert main(["bench", *arguments]) == 0
    printed = capsys.readouterr().out
    for name, summary in bench.BENCHES.items():
        assert f"  {name} " in printed
        assert summary in printed


def test_the_list_names_every_module_with_a_main() -> None:
    """A new measurement is not forgotten, and none is listed that is not there."""
    found = {path.stem for path in BENCH_DIRECTORY.glob("*.py") if "\ndef main(argv" in path.read_text()}
    assert found == set(bench.BENCHES)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_measurement_gets_its_arguments_as_they_are(
    returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options and `--help` are its own; what it returns is the exit code."""
    given: list[list[str]] = []
    module = types.ModuleType("bench.mesh")

    def measure(argv: list[str]) -> int | None:
        given.append(argv)
        return returned

    module.__dict__["main"] = measure
    monkeypatch.setitem(sys.modules, "bench.mesh", module)
    assert main(["bench", "mesh", "--rounds", "2", "--help", "-x"]) == code
    assert given == [["--rounds", "2", "--help", "-x"]]


def test_an_unknown_measurement_is_told_the_known_ones(capsys: Capture) -> None:
    """The message lists what there is."""
    assert main(["bench", "speed"]) == 1
    assert "queue_latency" in capsys.readouterr().err


def test_without_a_checkout_it_says_where_to_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """An installed mesh has no measurements; the message names the remedy."""
    monkeypatch.setitem(sys.modules, "bench", None)
    monkeypatch.delitem(sys.modules, "bench.mesh", raising=False)
    assert main(["bench", "mesh"]) == 1
    told = capsys.readouterr().err
    assert "checkout" in told
    assert "Traceback" not in told


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """It is not taken for a missing checkout."""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.delitem(sys.modules, "bench.mesh", raising=False)
    assert main(["bench", "mesh"]) == 1
    assert "rich.progress" in capsys.readouterr().err
