"""Uploads into a directory: what is taken in, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.errors import (
    ArgumentInvalid,
    ArtifactInvalid,
    InterlockError,
    QuotaExceeded,
    RevisionInUse,
    UploadConflict,
)
from services.controller.adapters.blob_intake import Chunk
from services.controller.core.catalog import GoldenPrompt, Manifest, ModelFile
from tests.fixtures.upload_world import (
    CONTENT,
    DIGEST,
    WEIGHTS,
    Place,
    chunks_of,
    manifest,
    push,
    read,
    sent,
    weights,
)


async def test_only_what_is_missing_is_sent(place: Place) -> None:
    """Files that another revision has are copied; the new one is found after a restart."""
    wanted = manifest(CONTENT)
    missing = await place.uploads.plan(wanted)
    assert missing == ((DIGEST, 0),)
    only = [chunk for chunk in chunks_of(CONTENT) if chunk.sha256 == DIGEST]
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
    (
        "more layers than tensors",
        bad(
            "config.json",
            b'{"model_type": "llama", "max_position_embeddings": 64, "num_hidden_layers": 9e10}',
        ),
        r"config\.json: `num_hidden_layers`",
    ),
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
    (
        "offsets that are text",
        bad(
            "model.safetensors",
            weights({"w": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}),
        ),
        "model.safetensors: .*data_offsets",
    ),
    (
        "a header that is longer than the file",
        bad("model.safetensors", weights(length=1_000)),
        "model.safetensors: .*longer than the file",
    ),
    (
        "an index that leads elsewhere",
        bad("model.safetensors.index.json", b'{"weight_map": {"w": "../../v1/w.pt"}}'),
        r"model\.safetensors\.index\.json: `weight_map`",
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


def lie(**fields: object) -> Manifest:
    """A manifest whose first file is not what it says."""
    true = manifest(CONTENT)
    return replace(true, files=(replace(true.files[2], **fields), *true.files[:2]))  # type: ignore[arg-type]


def twice(size_bytes: int) -> Manifest:
    """A manifest with one content under two names, and another size under the second."""
    true = manifest(CONTENT)
    return replace(true, files=(*true.files, ModelFile("more.json", size_bytes, true.files[0].sha256)))


BAD_MANIFESTS: list[tuple[str, Manifest, type[InterlockError]]] = [
    ("another model", manifest(CONTENT, model="other"), ArgumentInvalid),
    ("a name that is taken", manifest(CONTENT, revision="v1"), RevisionInUse),
    ("a foreign tokenizer", manifest(CONTENT, tokenizer_sha256="0" * 64), ArgumentInvalid),
    ("a digest that is none", lie(sha256="../../etc/passwd"), ArtifactInvalid),
    ("a negative size", lie(size_bytes=-1), ArtifactInvalid),
    ("more than the quota", lie(size_bytes=1 << 21), QuotaExceeded),
    ("a size beyond all bounds", lie(size_bytes=1 << 60), ArtifactInvalid),
    ("a digest with two sizes", twice(9), ArtifactInvalid),
    ("a name that has no room", manifest(bad("a" * 242 + ".json", b"{}")), ArtifactInvalid),
    ("a longer context than the model's", manifest(CONTENT, context_tokens=65), ArtifactInvalid),
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
    with pytest.raises(error):
        await place.uploads.receive(wanted, sent([Chunk(DIGEST, 0, WEIGHTS)]))
    assert [one.manifest.revision for one in place.catalog.revisions("m")] == ["v1"]


@pytest.mark.parametrize(("wanted", "named"), [(twice(9), "more.json"), (lie(size_bytes=-1), "bytes")])
async def test_a_plan_is_refused_before_anything_is_sent(place: Place, wanted: Manifest, named: str) -> None:
    """A digest with two sizes, of which one could never become whole, and a size that is none."""
    with pytest.raises(ArtifactInvalid, match=named):
        await place.uploads.plan(wanted)
    assert place.blobs == []


async def test_a_context_is_held_to_the_configuration(place: Place) -> None:
    """As it is for the model that the mesh is started with; as much as the model was made for passes."""
    with pytest.raises(ArtifactInvalid, match="context_tokens is 65; the model was made for at most 64"):
        await push(place, manifest(CONTENT, context_tokens=65), CONTENT)
    assert place.left_behind == []
    await push(place, manifest(CONTENT, context_tokens=64), CONTENT)


async def test_a_manifest_that_could_not_be_read_again_is_refused(place: Place) -> None:
    """Its record would be longer than what is read at the next start."""
    golden = tuple(GoldenPrompt("\1" * 4_096, "\1" * 4_096, 1) for _ in range(16))
    many = {f"{number:0>200}.txt": b"" for number in range(1_000)}
    await place.uploads.plan(manifest(CONTENT, golden_prompts=golden))
    with pytest.raises(ArtifactInvalid, match="fewer golden prompts"):
        await place.uploads.plan(manifest({**CONTENT, **many}, golden_prompts=golden))


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


@pytest.mark.parametrize("name", ["m", "Other", ".other", "a/b", "x" * 64], ids=ascii)
async def test_what_is_no_other_model_s_name_is_nothing_to_fall_back_to(place: Place, name: str) -> None:
    """Its own, or none; before anything is sent."""
    with pytest.raises(ArgumentInvalid, match=r"manifest\.fallback_model"):
        await place.uploads.plan(manifest(CONTENT, fallback_model=name))


async def test_what_a_revision_falls_back_to_is_kept(place: Place) -> None:
    """It is part of the revision, also after a restart."""
    made = await push(place, manifest(CONTENT, fallback_model="other"), CONTENT)
    later = Place(place.directory)
    await later.uploads.load()
    assert later.catalog.revision("m", "v2").manifest == made.manifest
    assert made.manifest.fallback_model == "other"


async def test_two_uploads_at_once(place: Place) -> None:
    """One wins, the other is told to come back."""

    async def slow() -> AsyncIterator[Chunk]:
        with pytest.raises(UploadConflict):
            await place.uploads.receive(manifest(CONTENT, revision="v3"), sent(()))
        yield Chunk(DIGEST, 0, WEIGHTS)

    await place.uploads.receive(manifest(CONTENT), slow())
    assert place.catalog.revision("m", "v2").manifest.files


@pytest.mark.skipif(not __debug__, reason="this is the run without assertions")
def test_the_rules_hold_without_assertions() -> None:
    """All tests of uploads once more with `PYTHONOPTIMIZE=1`: no rule is an `assert`."""
    files = sorted(Path(__file__).parent.glob("test_upload*.py"))
    assert len(files) > 3
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *map(str, files)],
        env={**os.environ, "PYTHONOPTIMIZE": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2_000:]
