"""Uploads after a restart, a crash or a loss of power: what is registered, and in which order."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.common.errors import RevisionInUse
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.revision_records import RECORD_BYTES_MAX
from services.controller.core.catalog import Revision
from tests.fixtures.upload_world import CONTENT, DIGEST, WEIGHTS, Place, manifest, push, read, sent

WHOLE = Chunk(DIGEST, 0, WEIGHTS)


async def loaded(place: Place) -> tuple[Place, list[Any]]:
    """The same directory after a restart, and what was logged meanwhile."""
    later = Place(place.directory)
    with capture_logs() as logged:
        await later.uploads.load()
    return later, logged


def names(place: Place) -> list[str]:
    """The registered revisions, newest first."""
    return [one.manifest.revision for one in place.catalog.revisions("m")]


async def test_what_a_crash_left_on_its_way_is_no_revision(place: Place) -> None:
    """A directory that had its manifest already, and one that was half removed."""
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    directory = place.directory / "data" / "revisions" / "m"
    for name in (".v8.new", ".v9.gone", ".v9.00c0ffee.gone"):
        shutil.copytree(directory / "v2", directory / name)
    later, logged = await loaded(place)
    assert names(later) == ["v2", "v1"]
    assert later.catalog.revision("m", "v2").local_path == str(directory / "v2")
    assert later.left_behind == []
    assert logged == []


async def test_revisions_keep_their_order(place: Place) -> None:
    """That of their age, whatever their names."""
    for name, quantization in (("b", "int8"), ("c", "nf4"), ("a", "fp4")):
        await push(place, manifest(CONTENT, revision=name, quantization=quantization), CONTENT)
        place.clock.seconds += 1
    assert names(place) == ["a", "c", "b", "v1"]
    later, _ = await loaded(place)
    assert names(later) == ["a", "c", "b", "v1"]


@pytest.mark.parametrize("same", [True, False])
async def test_the_mesh_is_started_with_its_own_revision(place: Place, same: bool) -> None:  # noqa: FBT001
    """An upload of the same name, of equal content or not, replaces neither it nor its directory."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    later = Place(place.directory)
    boot = later.directory / "other"
    shutil.copytree(made.local_path, boot)
    started = made.manifest if same else replace(made.manifest, quantization="nf4")
    later.catalog.register(Revision(started, str(boot), 5.0))
    with capture_logs() as logged:
        await later.uploads.load()
    assert later.catalog.revision("m", "v2") == Revision(started, str(boot), 5.0)
    assert [line["event"] for line in logged] == ([] if same else ["revision.name_taken"])
    with pytest.raises(RevisionInUse):
        await later.uploads.delete("m", "v2")
    assert later.catalog.revision("m", "v2").local_path == str(boot)
    assert read(Path(made.local_path)) == CONTENT


async def test_revisions_of_a_model_that_is_not_served_are_kept(place: Place) -> None:
    """It may be served again."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    directory = Path(made.local_path)
    record = json.loads((directory / "manifest.json").read_text())
    record["manifest"]["model"], record["content"] = "other", ""
    (directory / "manifest.json").write_text(json.dumps(record))
    shutil.move(directory.parent, directory.parent.with_name("other"))
    later, logged = await loaded(place)
    assert names(later) == ["v1"]
    assert [line["event"] for line in logged] == ["revision.of_no_model"]
    assert (directory.parent.with_name("other") / "v2").is_dir()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage to a record that is a record still."""

    def damage(directory: Path) -> None:
        record = json.loads((directory / "manifest.json").read_text())
        change(record)
        (directory / "manifest.json").write_text(json.dumps(record))

    return damage


def written(content: bytes) -> Callable[[Path], None]:
    """A record that is none."""
    return lambda directory: void((directory / "manifest.json").write_bytes(content))


def padded(directory: Path) -> None:
    """A record that is longer than any, and true."""
    text = (directory / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(text.ljust(RECORD_BYTES_MAX + 1))


def linked(directory: Path) -> None:
    """A file that lies elsewhere."""
    (directory / "config.json").rename(directory.parent.parent / "config.json")
    (directory / "config.json").symlink_to("../../config.json")


def foldered(directory: Path) -> None:
    """A record that is no file."""
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").mkdir()


def climbing(record: dict[str, Any]) -> None:
    """A file outside the directory, which is there and has the size."""
    file = next(one for one in record["manifest"]["files"] if one["path"] == "config.json")
    file["path"] = "../v2/config.json"
    record["content"] = ""


def renamed(record: dict[str, Any]) -> None:
    """The name of the revision that the mesh was started with."""
    record["manifest"]["revision"] = "v1"


def void(_: object) -> None:
    """Nothing."""


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("a path that climbs", edited(climbing), "plain file name"),
    ("another revision's name", edited(renamed), "another revision"),
    ("another model's name", edited(lambda one: one["manifest"].update(model="other")), "another revision"),
    (
        "another content",
        edited(lambda one: one["manifest"].update(context_tokens=63)),
        "not what was taken in",
    ),
    ("another digest", edited(lambda one: one["manifest"]["files"][0].update(sha256="0" * 64)), "taken in"),
    ("a field of another type", edited(lambda one: one["manifest"].update(files=5)), "no record"),
    ("no field at all", written(b"{}"), "no record"),
    ("a time that is none", edited(lambda one: one.update(create_time_s=float("nan"))), "time"),
    ("a time that nobody sees", edited(lambda one: one.update(create_time_s=1e15)), "time"),
    ("a record that is too long", padded, "1048576 bytes"),
    ("a record that was cut", written(b'{"manifest": {"mod'), "no record"),
    ("an empty record", written(b""), "no record"),
    ("a record that is no text", written(b"\xff\xfe"), "no record"),
    ("a record that is deep", written(b"[" * 200_000), "no record"),
    ("no record", lambda directory: (directory / "manifest.json").unlink(), "missing"),
    ("a record that is a directory", foldered, "no file"),
    ("a file that is gone", lambda one: (one / "config.json").unlink(), r"config\.json: missing"),
    ("a file that was cut", lambda one: os.truncate(one / "tokenizer.json", 5), r"tokenizer\.json: no file"),
    ("a file that is a link", linked, r"config\.json: no file"),
]


@pytest.mark.parametrize(("damage", "named"), [one[1:] for one in DAMAGE], ids=[one[0] for one in DAMAGE])
async def test_what_is_damaged_is_named_and_passed_over(
    place: Place, damage: Callable[[Path], None], named: str
) -> None:
    """The others are registered, and the same can be uploaded again in its place."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    await push(place, manifest(CONTENT, revision="v3", quantization="int8"), CONTENT)
    # The contents are shared; each is damaged in one directory alone.
    for name in CONTENT:
        copy = Path(made.local_path) / f"{name}.copy"
        shutil.copyfile(Path(made.local_path) / name, copy)
        copy.replace(Path(made.local_path) / name)
    damage(Path(made.local_path))
    later, logged = await loaded(place)
    assert names(later) == ["v3", "v1"]
    assert [(line["event"], line["revision"]) for line in logged] == [("revision.unreadable", "v2")]
    assert re.search(named, logged[0]["error"])
    later.clock.seconds += 1
    await push(later, manifest(CONTENT), CONTENT)
    again, logged = await loaded(later)
    assert names(again) == ["v2", "v3", "v1"]
    assert logged == []


async def test_a_record_of_an_earlier_version_is_read(place: Place) -> None:
    """It had no name of its content beside it."""
    made = await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    edited(lambda record: record.pop("content"))(Path(made.local_path))
    later, _ = await loaded(place)
    assert later.catalog.revision("m", "v2").manifest == made.manifest


async def test_a_revision_outlives_a_loss_of_power(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inside is durable before the directory has its name, and the name before the answer."""
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.replace
    root = place.directory / "data"

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = re.sub(r"[.][0-9a-f]{8}[.]new", ".N.new", str(path.relative_to(place.directory)))
        done.append(("sync", name))
        fsync(descriptor)

    def renamed_to(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        done.append(("name", str(target.relative_to(place.directory))))
        return renamed

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed_to)
    await place.uploads.receive(manifest(CONTENT), sent([WHOLE]))
    named = done.index(("name", "data/revisions/m/v2"))
    before, after = done[:named], done[named + 1 :]
    assert {path for what, path in before if what == "sync"} >= {
        # What made the directories and names on the way is there as well.
        ".",
        "data",
        "data/blobs",
        "data/revisions",
        "data/revisions/m/.v2.N.new",
        "data/revisions/m/.v2.N.new/manifest.json",
    }
    assert before[-1] == ("sync", "data/revisions/m/.v2.N.new")
    assert after == [("sync", "data/revisions/m"), ("sync", "data/revisions")]
    assert root.is_dir()
