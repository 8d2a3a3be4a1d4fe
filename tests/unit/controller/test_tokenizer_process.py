"""Tokenizers are read in a process of their own: the controller goes on meanwhile, whatever they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from services.common import artifacts
from services.common.errors import ArtifactInvalid, InternalError
from services.controller.adapters import tokenizer_process, tokenizer_trial
from services.controller.adapters.blob_intake import Chunk
from services.controller.adapters.tokenizer_process import try_tokenizer
from services.controller.adapters.uploads import Uploads
from tests.fixtures.upload_world import CONTENT, DIGEST, TOKENIZER, WEIGHTS, Place, manifest, sent


def write(directory: Path, tokenizer: bytes = TOKENIZER, **files: str) -> Path:
    """A directory with a tokenizer."""
    (directory / "tokenizer.json").write_bytes(tokenizer)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def words(count: int) -> bytes:
    """A tokenizer of so many words: its library reads some three million of them in ten seconds."""
    tokenizer = json.loads(TOKENIZER)
    vocabulary = {f"word{number:07d}": number for number in range(count)}
    tokenizer["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0000000"}
    return json.dumps(tokenizer).encode()


async def test_what_can_be_read_passes(tmp_path: Path) -> None:
    """With its template, or without."""
    await try_tokenizer(write(tmp_path))
    await try_tokenizer(write(tmp_path, chat_template__jinja="{{ messages[0].content }}"))


async def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """As whoever would load it says it."""
    with pytest.raises(ArtifactInvalid, match=r"tokenizer\.json: not usable"):
        await try_tokenizer(write(tmp_path, b"{}"))
    with pytest.raises(ArtifactInvalid, match="template"):
        await try_tokenizer(write(tmp_path, chat_template__jinja="{% if %}"))


async def test_the_child_has_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ours nor those of the artifacts' store: what it reads was sent by somebody."""
    given = ("AWS_SECRET_ACCESS_KEY", "FSSPEC_S3_SECRET", "INTERLOCK_JWT_SECRET")
    for name in given:
        monkeypatch.setenv(name, "secret")
    child = tokenizer_process._environment()
    assert "secret" not in child.values()
    assert child["PATH"]
    await try_tokenizer(write(tmp_path))


async def test_the_controller_goes_on_while_a_large_one_is_read(tmp_path: Path) -> None:
    """In a thread of ours the same file lets nobody else run for as long as it takes."""
    trial, turns = asyncio.create_task(try_tokenizer(write(tmp_path, words(200_000)))), 0
    while not trial.done():
        await asyncio.sleep(0.01)
        turns += 1
    await trial
    assert turns > 10


SPINNING = "tokenizer_trial.HfTokenizer.load = lambda directory: any(iter(int, 1))"


@pytest.mark.parametrize(
    ("smaller", "count"),
    [
        # However quick the machine is, this takes longer.
        (f"tokenizer_trial.CPU_LIMIT_S = 1\n{SPINNING}", 10),
        ("tokenizer_trial.MEMORY_BYTES_MAX = 200 << 20", 600_000),
    ],
    ids=["time", "memory"],
)
async def test_what_takes_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smaller: str, count: int
) -> None:
    """Its process ends, whether it lacks time or memory, and the controller says so."""
    program = tmp_path / "smaller.py"
    program.write_text(
        f"from services.controller.adapters import tokenizer_trial\n{smaller}\ntokenizer_trial.main()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tokenizer_process, "_PROGRAM", "smaller")
    with pytest.raises(ArtifactInvalid, match=r"tokenizer\.json: .*too much time or memory"):
        await try_tokenizer(write(tmp_path, words(count)))


async def test_what_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so it is when nobody waits for it any more."""
    (tmp_path / "hanging.py").write_text("import signal\nwhile True:\n    signal.pause()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tokenizer_process, "_PROGRAM", "hanging")
    monkeypatch.setattr(tokenizer_process, "GRACE_S", 0.2)
    monkeypatch.setattr(tokenizer_trial, "LIMIT_S", 0)
    with pytest.raises(ArtifactInvalid, match="too much time"):
        await try_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_process, "GRACE_S", 60.0)
    trial = asyncio.create_task(try_tokenizer(tmp_path))
    await asyncio.sleep(0.1)
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial


async def test_a_helper_that_does_not_start_is_no_flaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's file is as good as before."""
    monkeypatch.setattr(tokenizer_process, "_PROGRAM", "services.no_such_program")
    with pytest.raises(InternalError):
        await try_tokenizer(write(tmp_path))


async def test_uploads_are_read_in_it(place: Place) -> None:
    """Not only where a test says so: what the library refuses there gets no name."""
    uploads = Uploads(place.catalog, place.directory / "data", place.clock, bytes_max=1 << 20)
    bad = {**CONTENT, "tokenizer.json": b"[]"}
    chunks = [
        Chunk(file.sha256, 0, bad[file.path]) for file in manifest(bad).files if file.path == "tokenizer.json"
    ]
    with pytest.raises(ArtifactInvalid, match=r"tokenizer\.json"):
        await uploads.receive(manifest(bad), sent([*chunks, Chunk(DIGEST, 0, WEIGHTS)]))
    assert place.left_behind == []
    made = await uploads.receive(manifest(CONTENT, revision="v3"), sent(()))
    assert (Path(made.local_path) / "tokenizer.json").read_bytes() == TOKENIZER


async def test_a_tokenizer_has_a_bound_of_its_own() -> None:
    """Far below other texts': whoever tokenizes reads it whole."""
    size = artifacts.TOKENIZER_BYTES_MAX
    artifacts.check_files([artifacts.FileDigest("tokenizer.json", size, "0" * 64)])
    with pytest.raises(ArtifactInvalid, match=rf"tokenizer\.json: {size + 1} bytes; at most {size}"):
        artifacts.check_files([artifacts.FileDigest("tokenizer.json", size + 1, "0" * 64)])
