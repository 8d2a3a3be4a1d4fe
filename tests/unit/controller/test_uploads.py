"""Uploads into a directory: what is taken in, what is refused, and what a cut leaves behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from services.common import safetensors_files
from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    ClientStalled,
    InterlockError,
    QuotaExceeded,
    RevisionInUse,
    RevisionUnknown,
    UploadConflict,
)
from services.controller.adapters import blobs
from services.controller.adapters.blobs import CHUNK_BYTES_MAX, Chunk
from services.controller.adapters.uploads import Uploads
from services.controller.core.catalog import Catalog, Manifest, ModelFile, Revision
from tests.fakes.controller_ports import FakeClock

CONFIG = json.dumps({"model_type": "llama", "max_position_embeddings": 64}).encode()


def weights(header: object = None, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """A safetensors file of one tensor, or with another header."""
    one = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = header if isinstance(header, bytes) else json.dumps(one if header is None else header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TOKENIZER = Tokenizer(models.BPE()).to_str().encode()
CONTENT = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors": weights()}


def manifest(content: dict[str, bytes], **fields: object) -> Manifest:
    """A manifest that tells the truth about `content`, but for `fields`."""
    files = tuple(
        ModelFile(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in content.items()
    )
    made = Manifest("m", "v2", files, "auto", "auto", 64, "")
    return replace(made, **fields)  # type: ignore[arg-type]


async def sent(chunks: Iterable[Chunk]) -> AsyncIterator[Chunk]:
    """Chunks as they come from a client."""
    for chunk in chunks:
        yield chunk


def chunks_of(content: dict[str, bytes], size: int = 7) -> list[Chunk]:
    """All bytes, file after file, in small pieces."""
    return [
        Chunk(hashlib.sha256(data).hexdigest(), at, data[at : at + size])
        for data in content.values()
        for at in range(0, len(data), size)
    ]


class Place:
    """A controller's directory, with the model that the mesh was started with."""

    def __init__(self, directory: Path, *, bytes_max: int = 1 << 20) -> None:
        self.directory = directory
        self.catalog = Catalog()
        boot = directory / "boot"
        boot.mkdir(exist_ok=True)
        for name, data in {**CONTENT, "model.safetensors": weights(data=b"\1" * 8)}.items():
            (boot / name).write_bytes(data)
        first = manifest({path.name: path.read_bytes() for path in sorted(boot.iterdir())}, revision="v1")
        self.catalog.register(Revision(first, str(boot), 0.0))
        self.clock = FakeClock()
        self.uploads = Uploads(self.catalog, directory / "data", self.clock, bytes_max=bytes_max)

    @property
    def left_behind(self) -> list[str]:
        """Everything in the directory that is not whole."""
        data = self.directory / "data"
        return [path.name for path in data.rglob("*") if path.name.startswith(".")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty place."""
    return Place(tmp_path)


async def test_only_what_is_missing_is_sent(place: Place) -> None:
    """Files that another revision has are linked; the new one is found after a restart."""
    wanted = manifest(CONTENT)
    missing = await place.uploads.plan(wanted)
    digest = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()
    assert missing == ((digest, 0),)
    only = [chunk for chunk in chunks_of(CONTENT) if chunk.sha256 == digest]
    made = await place.uploads.receive(wanted, sent(only))
    assert read(Path(made.local_path)) == CONTENT
    assert made.manifest.tokenizer_sha256
    assert place.catalog.wanted("m") == "v1"
    assert await place.uploads.plan(wanted) == ()
    later = Place(place.directory)
    await later.uploads.load()
    assert later.catalog.revision("m", "v2").manifest == made.manifest


async def test_another_quantization_sends_nothing(place: Place) -> None:
    """The manifest alone makes it, and its content names it."""
    same = place.catalog.revision("m", "v1").manifest
    other = replace(same, revision="", quantization="nf4", tokenizer_sha256="")
    assert await place.uploads.plan(other) == ()
    made = await place.uploads.receive(other, sent(()))
    assert len(made.manifest.revision) == 12
    assert await place.uploads.receive(other, sent(())) == made


async def test_a_cut_upload_goes_on_where_it_ended(place: Place) -> None:
    """After a crash of the client, and after one of the controller."""
    wanted = manifest(CONTENT)
    digest = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()
    chunks = [chunk for chunk in chunks_of(CONTENT) if chunk.sha256 == digest]
    half = len(chunks) // 2

    async def cut() -> AsyncIterator[Chunk]:
        for chunk in chunks[:half]:
            yield chunk
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await place.uploads.receive(wanted, cut())
    later = Place(place.directory)
    await later.uploads.load()
    assert await later.uploads.plan(wanted) == ((digest, 7 * half),)
    with pytest.raises(ArtifactInvalid, match="not whole yet"):
        await later.uploads.receive(wanted, sent(chunks[half:-1]))
    with pytest.raises(ArgumentInvalid, match="offset"):
        await later.uploads.receive(wanted, sent(chunks[half:]))
    await later.uploads.receive(wanted, sent(chunks[-1:]))
    assert later.left_behind == []


def bad(name: str, data: bytes) -> dict[str, bytes]:
    """The content with one file replaced or added."""
    return {**CONTENT, name: data}


BOMB = b"[" * 200_000

BAD_CONTENT: list[tuple[str, dict[str, bytes], str]] = [
    ("a pickle", bad("model.bin", b"\x80\x04."), "model.bin"),
    ("a pickle under another name", bad("model.pt", b"\x80\x04."), "model.pt"),
    ("an archive", bad("model.zip", b"PK\3\4"), "model.zip"),
    ("a program", bad("modeling.py", b"import os"), "modeling.py"),
    ("a path that climbs", bad("../evil.json", b"{}"), "evil"),
    ("an absolute path", bad("/etc/evil.json", b"{}"), "evil"),
    ("a path with a directory", bad("a/evil.json", b"{}"), "evil"),
    ("a hidden name", bad(".evil.json", b"{}"), "evil"),
    ("a name with a line break", bad("evil\n.json", b"{}"), "evil"),
    ("the manifest's own name", bad("manifest.json", b"{}"), "manifest.json"),
    ("names that differ in case", bad("Config.json", b"{}"), "case"),
    ("code to import", bad("config.json", json.dumps({"auto_map": {"a": "b"}}).encode()), "auto_map"),
    (
        "code to import, deep inside",
        bad("tokenizer_config.json", json.dumps({"a": [{"auto_map": {}}]}).encode()),
        "auto_map",
    ),
    ("a configuration that is no JSON", bad("config.json", b"{"), "config.json"),
    ("a configuration that is deep", bad("config.json", BOMB), "config.json"),
    ("a model type with a path", bad("config.json", b'{"model_type": "../x"}'), "model_type"),
    ("a header of a terabyte", bad("model.safetensors", weights(length=1 << 40)), "model.safetensors"),
    ("a header that is no JSON", bad("model.safetensors", weights(b"{")), "model.safetensors"),
    (
        "tensors that lie behind the end",
        bad(
            "model.safetensors",
            weights({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8_000]}}),
        ),
        "model.safetensors",
    ),
    (
        "tensors that overlap",
        bad(
            "model.safetensors",
            weights(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                }
            ),
        ),
        "model.safetensors",
    ),
    (
        "a shape that is not its bytes",
        bad(
            "model.safetensors",
            weights({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        ),
        "model.safetensors",
    ),
    ("a template that is no template", bad("chat_template.jinja", b"{% for %}"), "chat template"),
    ("a tokenizer that is none", bad("tokenizer.json", b"{}"), "tokenizer.json"),
    ("an empty weight file", bad("model.safetensors", b""), "model.safetensors"),
    ("no weights", {name: CONTENT[name] for name in ("config.json", "tokenizer.json")}, "weights"),
    ("no tokenizer", {name: CONTENT[name] for name in ("config.json", "model.safetensors")}, "tokenizer"),
    ("no configuration", {name: CONTENT[name] for name in ("tokenizer.json", "model.safetensors")}, "config"),
]


@pytest.mark.parametrize(
    ("content", "named"), [one[1:] for one in BAD_CONTENT], ids=[c[0] for c in BAD_CONTENT]
)
async def test_bad_content_is_never_registered(place: Place, content: dict[str, bytes], named: str) -> None:
    """The refusal names what is wrong, and nothing half made stays."""
    wanted = manifest(content)
    with pytest.raises(InterlockError, match=f"(?i){named}"):
        await push(place, wanted, content)
    assert [one.manifest.revision for one in place.catalog.revisions("m")] == ["v1"]
    assert place.left_behind == []


def read(directory: Path) -> dict[str, bytes]:
    """The files that a revision's directory should have."""
    return {name: (directory / name).read_bytes() for name in CONTENT}


async def push(place: Place, wanted: Manifest, content: dict[str, bytes]) -> None:
    """What a client does."""
    missing = {sha256 for sha256, _ in await place.uploads.plan(wanted)}
    only = [chunk for chunk in chunks_of(content, 65_536) if chunk.sha256 in missing]
    await place.uploads.receive(wanted, sent(only))


def lie(**fields: object) -> Manifest:
    """A manifest whose first file is not what it says."""
    true = manifest(CONTENT)
    return replace(true, files=(replace(true.files[2], **fields), *true.files[:2]))  # type: ignore[arg-type]


BAD_MANIFESTS: list[tuple[str, Manifest, type[InterlockError]]] = [
    ("another model", manifest(CONTENT, model="other"), ArgumentInvalid),
    ("a name that is taken", manifest(CONTENT, revision="v1"), RevisionInUse),
    ("a foreign tokenizer", manifest(CONTENT, tokenizer_sha256="0" * 64), ArgumentInvalid),
    ("a digest that is none", lie(sha256="../../etc/passwd"), ArtifactInvalid),
    ("a negative size", lie(size_bytes=-1), ArtifactInvalid),
    ("more than the quota", lie(size_bytes=1 << 21), QuotaExceeded),
    ("a size beyond all bounds", lie(size_bytes=1 << 60), ArtifactInvalid),
    ("a wrong digest", lie(sha256="1" * 64), ArgumentInvalid),
    ("a size that is too large", lie(size_bytes=10_000), ArtifactInvalid),
    ("a size that is too small", lie(size_bytes=9), ArtifactInvalid),
]


@pytest.mark.parametrize(
    ("wanted", "error"), [one[1:] for one in BAD_MANIFESTS], ids=[c[0] for c in BAD_MANIFESTS]
)
async def test_a_manifest_that_lies_is_refused(
    place: Place, wanted: Manifest, error: type[InterlockError]
) -> None:
    """Before anything is stored under a name."""
    data = CONTENT["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(error):
        await place.uploads.receive(wanted, sent([Chunk(digest, 0, data)]))
    assert [one.manifest.revision for one in place.catalog.revisions("m")] == ["v1"]


@pytest.mark.parametrize(
    "name", ["..", ".", "...", ".v2.new", "-v", "V2", "a/b", "../v9", "a\n", "a\0b", "x" * 64], ids=ascii
)
async def test_a_name_that_is_no_plain_name_touches_nothing(place: Place, name: str) -> None:
    """It would become a directory: what was taken in before stays as it is."""
    await push(place, manifest(CONTENT), CONTENT)
    before = sorted(place.directory.rglob("*"))
    with pytest.raises(ArgumentInvalid, match=r"manifest\.revision"):
        await push(place, manifest(CONTENT, revision=name, quantization="int8"), CONTENT)
    assert sorted(place.directory.rglob("*")) == before


async def test_content_that_is_not_its_digest_is_thrown_away(place: Place) -> None:
    """And the upload begins again from its first byte."""
    wanted = manifest(CONTENT)
    digest = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()
    other = weights(data=b"\2" * 8)
    with pytest.raises(ArtifactInvalid, match="digest"):
        await place.uploads.receive(wanted, sent([Chunk(digest, 0, other)]))
    assert await place.uploads.plan(wanted) == ((digest, 0),)
    with pytest.raises(ArgumentInvalid, match=r"chunk\.data"):
        await place.uploads.receive(wanted, sent([Chunk(digest, 0, b"x" * (CHUNK_BYTES_MAX + 1))]))


async def test_two_uploads_at_once(place: Place) -> None:
    """One wins, the other is told to come back."""
    digest = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()

    async def slow() -> AsyncIterator[Chunk]:
        with pytest.raises(UploadConflict):
            await place.uploads.receive(manifest(CONTENT, revision="v3"), sent(()))
        yield Chunk(digest, 0, CONTENT["model.safetensors"])

    await place.uploads.receive(manifest(CONTENT), slow())
    assert place.catalog.revision("m", "v2").manifest.files


async def test_deleting_frees_what_nobody_names(place: Place) -> None:
    """Not the mesh's own revision, and not the bytes that another one needs."""
    digest = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()
    await place.uploads.receive(manifest(CONTENT), sent([Chunk(digest, 0, CONTENT["model.safetensors"])]))
    await place.uploads.receive(manifest(CONTENT, revision="v3", quantization="int8"), sent(()))
    blob = place.directory / "data" / "blobs" / digest
    place.clock.seconds += 1e9
    await place.uploads.delete("m", "v2")
    assert blob.exists()
    await place.uploads.delete("m", "v3")
    assert not blob.exists()
    with pytest.raises(RevisionUnknown):
        await place.uploads.delete("m", "v3")
    with pytest.raises(RevisionInUse):
        await place.uploads.delete("m", "v1")


async def test_what_came_already_counts_once(tmp_path: Path) -> None:
    """An upload that was cut goes on where there is room for it, but not for half of it once more."""
    data = weights(data=b"\2" * 8)
    content = {**CONTENT, "model.safetensors": data}
    place = Place(tmp_path, bytes_max=sum(map(len, content.values())))
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(content), sent([Chunk(digest, 0, data[:60])]))
    await place.uploads.receive(manifest(content), sent([Chunk(digest, 60, data[60:])]))
    other = {**CONTENT, "model.safetensors": weights(data=b"\3" * 8), "more.json": b"0" * len(TOKENIZER)}
    with pytest.raises(QuotaExceeded):
        await place.uploads.receive(manifest(other, revision="v3"), sent(()))


async def test_deleting_leaves_what_another_upload_has_sent(place: Place) -> None:
    """Its client was cut between two files, and comes back."""
    data = {"model.safetensors": weights(data=b"\2" * 8), "more.json": b"[1]"}
    sent_first, missing = (Chunk(hashlib.sha256(one).hexdigest(), 0, one) for one in data.values())
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest({**CONTENT, **data}, revision="v3"), sent([sent_first]))
    await place.uploads.receive(manifest(CONTENT), sent(chunks_of({"w": CONTENT["model.safetensors"]})))
    place.clock.seconds += 1e9
    await place.uploads.delete("m", "v2")
    assert await place.uploads.plan(manifest({**CONTENT, **data}, revision="v3")) == ((missing.sha256, 0),)


async def test_what_nobody_came_back_for_makes_room(place: Place) -> None:
    """A day later it is gone when the next upload begins, whether it was whole or not."""
    data = weights(data=b"\2" * 8)
    digest = hashlib.sha256(data).hexdigest()
    cut = manifest({**CONTENT, "model.safetensors": data}, revision="v3")
    for chunk in (Chunk(digest, 0, data[:9]), Chunk(digest, 9, data[9:])):
        with pytest.raises((ArtifactInvalid, ArgumentInvalid)):
            await place.uploads.receive(cut, sent([chunk, Chunk("0" * 64, 0, b"x")]))
        assert list((place.directory / "data" / "blobs").iterdir())
    place.clock.seconds = time.time() + blobs.ORPHAN_KEPT_S + 1
    with pytest.raises(ArtifactInvalid, match="not whole"):
        await place.uploads.receive(manifest(CONTENT), sent(()))
    assert list((place.directory / "data" / "blobs").iterdir()) == []


async def test_a_client_that_falls_silent_makes_way(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so, what it sent is kept, and another one can upload."""
    monkeypatch.setattr(blobs, "CHUNK_WAIT_S", 0.05)
    data = CONTENT["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()

    async def silent() -> AsyncIterator[Chunk]:
        yield Chunk(digest, 0, data[:9])
        await asyncio.Event().wait()

    with pytest.raises(ClientStalled):
        await place.uploads.receive(manifest(CONTENT), silent())
    await place.uploads.receive(manifest(CONTENT, revision="v3"), sent([Chunk(digest, 9, data[9:])]))


async def test_a_client_that_leaves_at_the_end_leaves_no_lock_and_no_half(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is put together in a thread, which nothing stops: nobody else begins before it ends."""
    begun = threading.Event()
    check_files = safetensors_files.check_files

    def slow(*args: Any) -> None:
        begun.set()
        time.sleep(0.2)
        check_files(*args)

    monkeypatch.setattr(safetensors_files, "check_files", slow)
    wanted = manifest(CONTENT)
    chunk = Chunk(hashlib.sha256(CONTENT["model.safetensors"]).hexdigest(), 0, CONTENT["model.safetensors"])
    upload = asyncio.create_task(place.uploads.receive(wanted, sent([chunk])))
    await asyncio.to_thread(begun.wait)
    upload.cancel()
    await asyncio.sleep(0)
    with pytest.raises(UploadConflict):
        await place.uploads.receive(wanted, sent(()))
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert place.left_behind == []
    await place.uploads.receive(wanted, sent(()))
    assert place.catalog.revision("m", "v2").manifest.files


async def test_what_a_crash_left_on_its_way_is_no_revision(place: Place) -> None:
    """A directory that had its manifest already, and one that was half removed."""
    chunk = Chunk(hashlib.sha256(CONTENT["model.safetensors"]).hexdigest(), 0, CONTENT["model.safetensors"])
    await place.uploads.receive(manifest(CONTENT), sent([chunk]))
    directory = place.directory / "data" / "revisions" / "m"
    for name in (".v8.new", ".v9.gone"):
        shutil.copytree(directory / "v2", directory / name)
    later = Place(place.directory)
    await later.uploads.load()
    assert sorted(revision.manifest.revision for revision in later.catalog.revisions("m")) == ["v1", "v2"]
    assert later.catalog.revision("m", "v2").local_path == str(directory / "v2")
    assert later.left_behind == []


@pytest.mark.skipif(not __debug__, reason="this is the run without assertions")
def test_the_rules_hold_without_assertions() -> None:
    """All of the above once more with `PYTHONOPTIMIZE=1`: no rule is an `assert`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env={**os.environ, "PYTHONOPTIMIZE": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2_000:]
