"""The cache of revisions: a directory has the files of its name alone, and goes when nobody uses it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.common.artifacts import FileDigest
from services.worker.adapters.revision_cache import RevisionCache

SIZE = 1_000
# Room for two revisions.
BYTES_MAX = 2 * SIZE


def files_of(content: str, *names: str) -> tuple[FileDigest, ...]:
    """Files of one content, which take `SIZE` bytes together."""
    names = names or ("model.safetensors",)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return tuple(FileDigest(name, SIZE // len(names), digest) for name in names)


async def filled(cache: RevisionCache, revision: str, content: str = "") -> Path:
    """A revision that was claimed and fetched, as the last one so far."""
    files = files_of(content or revision)
    path = await cache.claim(revision, files)
    for file in files:
        (path / file.path).write_bytes(bytes(file.size_bytes))
    return path


def grow_old(*paths: Path) -> None:
    """Makes the first of some directories the one that was used least recently."""
    for age, path in enumerate(reversed(paths), start=1):
        os.utime(path / ".used", (1_000_000 - age, 1_000_000 - age))


async def test_revisions_of_the_same_files_share_them(tmp_path: Path) -> None:
    """As where quantization alone differs: nothing is fetched twice."""
    cache = RevisionCache(tmp_path, BYTES_MAX)
    first = await filled(cache, "plain", "same")
    assert await cache.claim("quantized", files_of("same")) == first
    assert (first / "model.safetensors").exists()
    cache.release("plain")
    # The other one still needs them.
    await filled(cache, "b")
    await filled(cache, "c")
    assert first.exists()


async def test_no_file_of_another_revision_is_seen(tmp_path: Path) -> None:
    """Not even under a name that was used before: a loader would prefer one file to several."""
    cache = RevisionCache(tmp_path, BYTES_MAX)
    await filled(cache, "v2", "whole")
    cache.release("v2")
    shards = files_of("in parts", "model-00001.safetensors", "model-00002.safetensors")
    assert not [*(await cache.claim("v2", shards)).glob("*.safetensors")]


async def test_beyond_the_bound_the_least_recently_used_goes(tmp_path: Path) -> None:
    """And no more than that; what was only begun is counted by its whole size."""
    cache = RevisionCache(tmp_path / "made", BYTES_MAX)
    old, new = await filled(cache, "old"), await filled(cache, "new")
    for revision in ("old", "new", "unknown"):
        cache.release(revision)
    grow_old(old, new)
    again = await cache.claim("old", files_of("old"))
    assert (again, new.exists()) == (old, True)
    cache.release("old")
    await cache.claim("next", files_of("next"))
    assert (old.exists(), new.exists()) == (True, False)


async def test_what_is_larger_than_the_bound_is_served_all_the_same(tmp_path: Path) -> None:
    """It is alone then; what was kept by name and not by content goes, too."""
    left = tmp_path / "m" / "r1" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(SIZE))
    cache = RevisionCache(tmp_path, 0)
    assert (await filled(cache, "a")).exists()
    assert not (tmp_path / "m").exists()


async def test_what_any_worker_of_the_host_uses_stays(tmp_path: Path) -> None:
    """Two share the directory: one that is beyond the bound removes nothing of the other's."""
    one, two = RevisionCache(tmp_path, 0), RevisionCache(tmp_path, 0)
    mine, theirs = await asyncio.gather(filled(one, "a"), filled(two, "b"))
    await filled(one, "c")
    assert mine.exists()
    assert theirs.exists()
    two.release("b")
    await filled(one, "d")
    assert not theirs.exists()


async def test_what_a_dead_worker_used_may_go(tmp_path: Path) -> None:
    """Its claims end with its process, however that ended."""
    code = (
        "import asyncio, sys, pathlib\n"
        "from tests.unit.worker.test_revision_cache import RevisionCache, filled\n"
        "print(asyncio.run(filled(RevisionCache(pathlib.Path(sys.argv[1]), 0), 'a')), flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    theirs = tmp_path / Path((await process.stdout.readline()).decode().strip()).name
    cache = RevisionCache(tmp_path, 0)
    await filled(cache, "b")
    kept = theirs.exists()
    process.kill()
    await process.communicate()
    await filled(cache, "c")
    assert (kept, theirs.exists()) == (True, False)


async def test_where_the_disk_is_short_more_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound may be larger than the disk: what nobody uses gives way to what is wanted."""
    cache = RevisionCache(tmp_path, 1 << 40)
    old, new, used = [await filled(cache, name) for name in ("old", "new", "used")]
    for revision in ("old", "new"):
        cache.release(revision)
    grow_old(old, new)

    def usage(_: Path) -> SimpleNamespace:
        # A disk has no port; this is what it has left.
        return SimpleNamespace(free=4 * SIZE - SIZE * len([*tmp_path.glob("*/*.safetensors")]))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    await filled(cache, "a")
    assert old.exists()
    await filled(cache, "b")
    assert (old.exists(), new.exists(), used.exists()) == (False, True, True)
