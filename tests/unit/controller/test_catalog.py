"""Revisions: how they are named, found, and read from a directory."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.errors import ArgumentInvalid, ArtifactInvalid, ModelUnknown, RevisionUnknown
from services.controller.adapters.local_revisions import LocalRevisionFiles, read_revision
from services.controller.core.catalog import Catalog, Revision


def write_model(directory: Path, **config: object) -> Path:
    """A directory with the shape of a model."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 64, **config}))
    (directory / "model.safetensors").write_bytes(b"w" * 3_000)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def read(
    directory: Path, *, quantization: str = "auto", context_tokens: int = 0, now_s: float = 1.0
) -> Revision:
    """The revision in `directory`."""
    return read_revision(
        directory,
        model="m",
        quantization=quantization,
        compute_dtype="auto",
        context_tokens=context_tokens,
        now_s=now_s,
    )


def test_name_follows_content(tmp_path: Path) -> None:
    """Equal content has one name, wherever it lies; other weights or another quantization have another."""
    first = read(write_model(tmp_path / "a")).manifest
    assert read(write_model(tmp_path / "b")).manifest == first
    assert len(first.revision) == 12
    assert read(tmp_path / "a", quantization="int8").manifest.revision != first.revision
    (tmp_path / "b" / "model.safetensors").write_bytes(b"other")
    assert read(tmp_path / "b").manifest.revision != first.revision
    assert first.named() == first


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [({}, 0, 64), ({}, 32, 32), ({"max_position_embeddings": None, "n_positions": 16}, 0, 16)],
)
def test_context(tmp_path: Path, config: dict[str, object], asked: int, expected: int) -> None:
    """The context is the model's own unless less is asked for."""
    assert read(write_model(tmp_path, **config), context_tokens=asked).manifest.context_tokens == expected


def test_context_beyond_the_model(tmp_path: Path) -> None:
    """A context that the model was not made for is refused."""
    with pytest.raises(ArtifactInvalid, match="at most 64"):
        read(write_model(tmp_path), context_tokens=65)


def test_context_unknown(tmp_path: Path) -> None:
    """Without a length in config.json the operator must give one."""
    with pytest.raises(ArtifactInvalid, match="context_tokens"):
        read(write_model(tmp_path, max_position_embeddings=None))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_model(tmp_path: Path, name: str) -> None:
    """A directory without configuration or weights is no model."""
    (write_model(tmp_path) / name).unlink()
    with pytest.raises(ArtifactInvalid):
        read(tmp_path)


def test_lookup(tmp_path: Path) -> None:
    """Revisions are found by name, newest first; unknown names have errors of their own."""
    catalog = Catalog()
    with pytest.raises(ModelUnknown):
        catalog.default_model()
    first = read(write_model(tmp_path))
    second = replace(first, manifest=replace(first.manifest, quantization="nf4").named())
    catalog.register(first)
    catalog.register(second)
    assert catalog.models() == ("m",)
    assert catalog.revisions("m") == (second, first)
    assert catalog.wanted("m") == first.manifest.revision
    with pytest.raises(ModelUnknown):
        catalog.revisions("other")
    with pytest.raises(RevisionUnknown):
        catalog.revision("m", "other")


def test_the_newest_of_all_times_comes_first(tmp_path: Path) -> None:
    """In whatever order they were registered; what shall serve is the first that was."""
    catalog = Catalog()
    first = replace(read(write_model(tmp_path)), create_time_s=20.0)
    for quantization, time_s in (("auto", 20.0), ("nf4", 10.0), ("int8", 30.0)):
        manifest = replace(first.manifest, quantization=quantization).named()
        catalog.register(replace(first, manifest=manifest, create_time_s=time_s))
    shown = [(one.manifest.quantization, one.create_time_s) for one in catalog.revisions("m")]
    assert shown == [("int8", 30.0), ("auto", 20.0), ("nf4", 10.0)]
    assert catalog.wanted("m") == first.manifest.revision
    with pytest.raises(ModelUnknown):
        catalog.wanted("other")


@pytest.mark.parametrize(("now_s", "expected_s"), [(900.0, 300.0), (1_000.0, 300.0), (200.0, 200.0)])
def test_a_directory_is_as_old_as_its_newest_file(tmp_path: Path, now_s: float, expected_s: float) -> None:
    """At every start the same; nothing is from the future."""
    model = write_model(tmp_path)
    for time_s, file in zip((100, 300, 200), sorted(model.iterdir()), strict=True):
        os.utime(file, (time_s, time_s))
    assert read(model, now_s=now_s).create_time_s == expected_s


async def test_files_are_read_from_an_offset(tmp_path: Path) -> None:
    """A file of the manifest is read from any byte; nothing else can be named."""
    revision = read(write_model(tmp_path))
    catalog = Catalog()
    catalog.register(revision)
    files, name = LocalRevisionFiles(catalog), revision.manifest.revision
    assert b"".join([data async for data in files.read("m", name, "model.safetensors", 2_990)]) == b"w" * 10
    assert [data async for data in files.read("m", name, "model.safetensors", 3_000)] == []
    for path, offset in (("../config.json", 0), ("/etc/passwd", 0), ("config.json", 10_000)):
        with pytest.raises(ArgumentInvalid):
            _ = [data async for data in files.read("m", name, path, offset)]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ArtifactInvalid, match="gone"):
        _ = [data async for data in files.read("m", name, "tokenizer.json", 0)]
