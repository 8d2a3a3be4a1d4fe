"""Model files: which are accepted, and how they are fetched so that nothing wrong ever bears their name."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.common.artifacts import (
    CONFIG_BYTES_MAX,
    FILES_MAX,
    FileDigest,
    check_files,
    describe,
    fetch,
    tokenizer_digest,
    tokenizer_files,
)
from services.common.errors import ArtifactInvalid, InternalError

WEIGHTS = os.urandom(50_000)
# One bit off, of the same length.
ALTERED = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])


def digest(path: str, content: bytes) -> FileDigest:
    """A file with the right digest."""
    return FileDigest(path, len(content), hashlib.sha256(content).hexdigest())


FILES = (digest("config.json", b"{}"), digest("model.safetensors", WEIGHTS))


class FakeSource:
    """What downloads come from.

    Attributes:
        contents: The files that it has.
        calls: What was asked of it: path and offset.
        breaks_after: Chunks after which the connection is lost; None: never.
    """

    def __init__(self, **contents: bytes) -> None:
        self.contents = {"config.json": b"{}", "model.safetensors": WEIGHTS}
        self.contents.update({name.replace("_", "."): content for name, content in contents.items()})
        self.calls: list[tuple[str, int]] = []
        self.breaks_after: int | None = None
        self.open_calls = 0

    async def download(self, path: str, offset: int) -> AsyncIterator[bytes]:
        """Yields a file in chunks of 10,000 bytes."""
        self.calls.append((path, offset))
        self.open_calls += 1
        try:
            content = self.contents[path][offset:]
            for number, start in enumerate(range(0, len(content), 10_000)):
                if number == self.breaks_after:
                    raise ConnectionError("lost")
                yield content[start : start + 10_000]
        finally:
            self.open_calls -= 1


async def fetched(source: FakeSource, directory: Path, *, local_path: str = "") -> Path:
    """Fetches `FILES`, unwatched."""
    return await fetch(
        FILES,
        local_path=local_path,
        download=source.download,
        directory=directory,
        on_progress=lambda _done, _total: None,
    )


def write(directory: Path, **contents: bytes) -> Path:
    """A directory with the files of a model, `_` for the dot of a name."""
    directory.mkdir(exist_ok=True)
    for name, content in {"config_json": b"{}", "model_safetensors": WEIGHTS, **contents}.items():
        (directory / name.replace("_", ".")).write_bytes(content)
    return directory


def names(directory: Path) -> list[str]:
    """What is in a directory, hidden files included."""
    return sorted(entry.name for entry in directory.iterdir())


def test_describe(tmp_path: Path) -> None:
    """Files are named with size and digest, sorted; what nothing loads is left out."""
    write(tmp_path, README_md=b"hello", chat_jinja=b"x")
    (tmp_path / ".gitattributes").write_text("x")
    assert describe(tmp_path) == (digest("chat.jinja", b"x"), *FILES)


def test_describing_is_followed(tmp_path: Path) -> None:
    """Whoever waits hears how much there is, then how much was read, and no more."""
    seen: list[tuple[int, int]] = []
    describe(write(tmp_path, README_md=b"hello", chat_jinja=b""), lambda *told: seen.append(told))
    total = sum(file.size_bytes for file in FILES)
    assert seen == [(0, total), (2, total), (total, total)]


def test_describe_nothing(tmp_path: Path) -> None:
    """A directory that does not exist is told without its path."""
    with pytest.raises(ArtifactInvalid) as caught:
        describe(tmp_path / "missing")
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.PKL", "modeling.py", "a.zip", "a.tar.gz", "a.ckpt"],
)
def test_code_is_refused(tmp_path: Path, name: str) -> None:
    """A directory with something that runs or unpacks when it is loaded is refused whole, by name."""
    (write(tmp_path) / name).write_bytes(b"x")
    with pytest.raises(ArtifactInvalid, match=name):
        describe(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"auto_map": {"AutoModel": "x.Y"}}, {"text_config": [{"auto_map": {}}]}],
    ids=["at the top", "deep inside"],
)
def test_auto_map_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    """A configuration that names code to import is refused at any depth, in every configuration file."""
    write(tmp_path, config_json=json.dumps(config).encode())
    with pytest.raises(ArtifactInvalid, match="auto_map"):
        describe(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactInvalid, match="auto_map"):
        describe(tmp_path)


@pytest.mark.parametrize("content", [b"no json", b"\xff\xfe", b"[" * 100_000], ids=["text", "bytes", "deep"])
def test_broken_configuration(tmp_path: Path, content: bytes) -> None:
    """A configuration that cannot be read as JSON is refused."""
    with pytest.raises(ArtifactInvalid, match=r"config\.json"):
        describe(write(tmp_path, config_json=content))


def test_links(tmp_path: Path) -> None:
    """A link inside the directory is a file; one that leads out, or nowhere, is refused."""
    inside = write(tmp_path / "inside")
    (inside / "second.safetensors").symlink_to("model.safetensors")
    assert digest("second.safetensors", WEIGHTS) in describe(inside)
    outside = write(tmp_path / "outside")
    (outside / "second.safetensors").symlink_to(inside / "model.safetensors")
    with pytest.raises(ArtifactInvalid, match="link"):
        describe(outside)
    broken = write(tmp_path / "broken")
    (broken / "second.safetensors").symlink_to("nothing")
    with pytest.raises(ArtifactInvalid, match="link"):
        describe(broken)


def test_odd_entries(tmp_path: Path) -> None:
    """Directories, pipes, strange names and oversized configurations are refused."""
    nested = write(tmp_path / "nested")
    (nested / "more").mkdir()
    with pytest.raises(ArtifactInvalid, match="more"):
        describe(nested)
    strange = write(tmp_path / "strange")
    (strange / "a b.json").write_text("{}")
    with pytest.raises(ArtifactInvalid, match="a b"):
        describe(strange)
    large = write(tmp_path / "large")
    os.truncate(large / "config.json", CONFIG_BYTES_MAX + 1)
    with pytest.raises(ArtifactInvalid, match="at most"):
        describe(large)


@pytest.mark.parametrize(
    "file",
    [
        FileDigest("../config.json", 1, "0" * 64),
        FileDigest("/etc/config.json", 1, "0" * 64),
        FileDigest("a/config.json", 1, "0" * 64),
        FileDigest("a\\..\\config.json", 1, "0" * 64),
        FileDigest(".config.json", 1, "0" * 64),
        FileDigest("config.json\n", 1, "0" * 64),
        FileDigest("", 1, "0" * 64),
        FileDigest("a" * 300 + ".json", 1, "0" * 64),
        FileDigest("model.bin", 1, "0" * 64),
        FileDigest("config.json", -1, "0" * 64),
        FileDigest("config.json", 1 << 40, "0" * 64),
        FileDigest("config.json", 1, "0" * 63),
        FileDigest("config.json", 1, "A" * 64),
    ],
)
def test_manifest_rules(file: FileDigest) -> None:
    """Names that lead elsewhere, foreign kinds, impossible sizes and malformed digests are refused."""
    with pytest.raises(ArtifactInvalid):
        check_files([file])


@pytest.mark.parametrize(("length", "fits"), [(246, True), (247, False), (5_000, False)])
async def test_a_name_has_room_for_its_way(length: int, fits: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """The longest that is allowed can be fetched, and a longer one is refused in words."""
    file = FileDigest("a" * (length - 5) + ".json", 2, hashlib.sha256(b"{}").hexdigest())
    source = FakeSource()
    source.contents = {file.path: b"{}"}
    fetching = fetch(
        [file], local_path="", download=source.download, directory=tmp_path, on_progress=lambda _, __: None
    )
    if fits:
        assert names(await fetching) == [file.path]
    else:
        with pytest.raises(ArtifactInvalid, match=f"{length} bytes; at most 246"):
            await fetching


def test_a_name_is_measured_in_bytes() -> None:
    """A file system counts those, not characters."""
    with pytest.raises(ArtifactInvalid, match="255 bytes"):
        check_files([digest("\u00e9" * 125 + ".json", b"{}")])


def test_one_digest_has_one_size() -> None:
    """Two files of one content are one thing that is kept; they cannot have two lengths."""
    files = [digest("a.json", b"{}"), digest("b.json", b"{}")]
    check_files(files)
    with pytest.raises(ArtifactInvalid, match=r"b\.json: has the digest of another file"):
        check_files([files[0], replace(files[1], size_bytes=3)])


def test_manifest_counts() -> None:
    """A file is named once, and a revision has a bounded number of them."""
    with pytest.raises(ArtifactInvalid, match="twice"):
        check_files([FILES[0], FILES[0]])
    with pytest.raises(ArtifactInvalid, match="at most"):
        check_files([FileDigest(f"{number}.json", 1, "0" * 64) for number in range(FILES_MAX + 1)])


def test_tokenizer_digest() -> None:
    """Only what turns text into ids counts, in any order."""
    tokenizer, template = digest("tokenizer.json", b"t"), digest("chat_template.jinja", b"c")
    assert tokenizer_files([*FILES, tokenizer]) == (tokenizer,)
    assert tokenizer_digest([tokenizer, *FILES, template]) == tokenizer_digest([template, tokenizer])
    assert tokenizer_digest([tokenizer]) != tokenizer_digest([digest("tokenizer.json", b"u")])


async def test_fetch_downloads(tmp_path: Path) -> None:
    """What is missing arrives whole, with progress that only grows, and leaves no temporary file."""
    source, seen = FakeSource(), []
    path = await fetch(
        FILES,
        local_path="",
        download=source.download,
        directory=tmp_path / "new" / "cache",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert describe(path) == FILES
    assert names(path) == ["config.json", "model.safetensors"]
    total = sum(file.size_bytes for file in FILES)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {each for _, each in seen} == {total}


async def test_fetch_prefers_what_is_there(tmp_path: Path) -> None:
    """A local directory with the right files is used as it is; one wrong byte, and they are downloaded."""
    source, local, cache = FakeSource(), write(tmp_path / "local"), tmp_path / "cache"
    assert await fetched(source, cache, local_path=str(local)) == local
    assert source.calls == []
    assert not cache.exists()
    (local / "model.safetensors").write_bytes(ALTERED)
    assert await fetched(source, cache, local_path=str(local)) == cache
    assert describe(cache) == FILES
    source.calls.clear()
    assert await fetched(source, cache, local_path=str(tmp_path / "nowhere")) == cache
    assert source.calls == []


async def test_fetch_resumes(tmp_path: Path) -> None:
    """A download that was cut off goes on where it ended; the call that broke is closed."""
    source = FakeSource()
    source.breaks_after = 2
    with pytest.raises(ConnectionError):
        await fetched(source, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    source.breaks_after = None
    await fetched(source, tmp_path)
    assert source.calls[-1] == ("model.safetensors", 20_000)
    assert source.open_calls == 0
    assert describe(tmp_path) == FILES


@pytest.mark.parametrize(
    "content",
    [ALTERED, WEIGHTS[:-1], WEIGHTS + b"?", b""],
    ids=["altered", "short", "long", "empty"],
)
async def test_fetch_refuses_wrong_content(tmp_path: Path, content: bytes) -> None:
    """What is not the wanted content is an error, and no trace of it stays; the next attempt works."""
    source = FakeSource(model_safetensors=content)
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors"):
        await fetched(source, tmp_path)
    assert names(tmp_path) == ["config.json"]
    assert source.open_calls == 0
    assert await fetched(FakeSource(), tmp_path) == tmp_path


async def test_fetch_discards_a_foreign_part(tmp_path: Path) -> None:
    """A part that is longer than the file begins anew; one with other content ends in an error once."""
    (tmp_path / ".model.safetensors.partial").write_bytes(WEIGHTS * 2)
    await fetched(FakeSource(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / ".model.safetensors.partial").write_bytes(b"?" * 100)
    with pytest.raises(ArtifactInvalid):
        await fetched(FakeSource(), tmp_path)
    assert await fetched(FakeSource(), tmp_path) == tmp_path


async def test_fetch_follows_no_link(tmp_path: Path) -> None:
    """A link in the cache never leads a write out of it."""
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.write_text("mine")
    cache.mkdir()
    (cache / "model.safetensors").symlink_to(victim)
    (cache / ".config.json.partial").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        await fetched(FakeSource(), cache)
    (cache / ".config.json.partial").unlink()
    await fetched(FakeSource(), cache)
    assert victim.read_text() == "mine"
    assert not (cache / "model.safetensors").is_symlink()


async def test_fetch_checks_the_manifest_first(tmp_path: Path) -> None:
    """Nothing is asked for or written for a manifest that breaks a rule."""
    source = FakeSource()
    with pytest.raises(ArtifactInvalid):
        await fetch(
            [FileDigest("../victim.json", 1, "0" * 64)],
            local_path="",
            download=source.download,
            directory=tmp_path / "cache",
            on_progress=lambda _done, _total: None,
        )
    assert source.calls == []
    assert names(tmp_path) == []


async def test_two_fetch_into_one_directory(tmp_path: Path) -> None:
    """Of two that fetch the same, one downloads and the other finds the files."""
    first, second = FakeSource(), FakeSource()
    await asyncio.gather(fetched(first, tmp_path), fetched(second, tmp_path))
    assert sorted([len(first.calls), len(second.calls)]) == [0, 2]


async def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told in words, and the part is removed so that it holds no space."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # There is no port for a disk; the system call is the boundary.
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InternalError, match="disk is full"):
        await fetched(FakeSource(), tmp_path)
    assert names(tmp_path) == []
