"""Model files by digest. Owns: which files may make a revision, and how a member of the mesh gets them.

Must not know: gRPC, protobuf, or any service. Bytes arrive through a callable; hashing and writing run in
threads, so that the event loop keeps answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ArtifactInvalid, InternalError
from services.common.known_digests import KnownDigests, read_digest
from services.common.partial_file import NAME_BYTES_MAX, PartialFile, directory_descriptor
from services.common.threads import in_haltable_thread, in_thread

# Data formats only: none of these can run code when it is read.
ALLOWED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

# What executes or unpacks when it is loaded. A directory that holds one of these is refused whole, so that
# nobody believes that it is served.
REFUSED_SUFFIXES = (
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5", ".msgpack"),
    *(".py", ".pyc", ".so", ".sh"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl"),
)

# Equal contents of these mean equal token ids for equal text.
TOKENIZER_NAMES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("chat_template.jinja", "chat_template.json"),
    }
)

# The largest public checkpoints have a few hundred shards; a manifest of this many still fits one message.
FILES_MAX = 1_024
# Shards are 5 to 50 GB in practice.
WEIGHTS_BYTES_MAX = 128 << 30
# Vocabularies and merges beside the tokenizer, which repeats them; nobody here parses them.
TEXT_BYTES_MAX = 128 << 20
# The largest tokenizers in use have 35 MB. Whoever tokenizes reads it whole, which takes some seconds of a
# core and forty times its size in memory.
TOKENIZER_BYTES_MAX = 40 << 20
# Configurations are a few KB; they are parsed whole.
CONFIG_BYTES_MAX = 4 << 20

# How often a process looks whether another one has finished the same download.
LOCK_POLL_S = 0.1

# A plain name: no separator, no leading dot, nothing that a shell or a URL would read otherwise.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Download = Callable[[str, int], AsyncIterator[bytes]]
"""Yields the bytes of the file named by its path, from the given offset on."""

Progress = Callable[[int, int], None]
"""Is told how many bytes are there, of how many."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a revision.

    Attributes:
        path: Its name inside the revision.
        size_bytes: Its length.
        sha256: Digest of its content, 64 lower-case hexadecimal digits.
    """

    path: str
    size_bytes: int
    sha256: str


def describe(directory: Path, on_progress: Progress = lambda _done, _total: None) -> tuple[FileDigest, ...]:
    """Returns the files of a model in `directory` with their digests, sorted by path. Blocks; reads all.

    Hidden entries and kinds that nothing loads (a README, a picture) are left out.

    Args:
        directory: Where the model lies.
        on_progress: Is told in this thread how many bytes were read, of how many: with 0 at first.

    Raises:
        ArtifactInvalid: The directory cannot be read, or an entry breaks a rule.
    """
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        raise ArtifactInvalid("The model's directory does not exist or cannot be read.") from None
    names = [entry.name for entry in entries if _belongs(entry, directory)]
    size_bytes, done_bytes = sum(_size_bytes(directory / name) for name in names), 0

    def read(more_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += more_bytes
        on_progress(done_bytes, size_bytes)

    on_progress(0, size_bytes)
    files = tuple(_describe_file(directory / name, read) for name in names)
    check_files(files)
    for file in files:
        if file.path.endswith("config.json"):
            refuse_code(directory / file.path)
    return files


def check_files(files: Iterable[FileDigest]) -> None:
    """Checks what can be known without content: names, kinds, sizes, digests, and that no two contradict.

    Raises:
        ArtifactInvalid: A rule is broken; the message names the file.
    """
    seen: set[str] = set()
    sizes: dict[str, int] = {}
    for file in files:
        _check_name(file.path)
        if file.path in seen:
            raise ArtifactInvalid(f"{file.path}: named twice.")
        seen.add(file.path)
        if not 0 <= file.size_bytes <= _bytes_max(file.path):
            raise ArtifactInvalid(f"{file.path}: {file.size_bytes} bytes; at most {_bytes_max(file.path)}.")
        if _SHA256.fullmatch(file.sha256) is None:
            raise ArtifactInvalid(f"{file.path}: the digest is not 64 lower-case hexadecimal digits.")
        if sizes.setdefault(file.sha256, file.size_bytes) != file.size_bytes:
            raise ArtifactInvalid(f"{file.path}: has the digest of another file, and not its size.")
    if len(seen) > FILES_MAX:
        raise ArtifactInvalid(f"{len(seen)} files; a revision has at most {FILES_MAX}.")


def tokenizer_files(files: Iterable[FileDigest]) -> tuple[FileDigest, ...]:
    """Those of `files` that turn text into token ids: what a gateway needs."""
    return tuple(file for file in files if file.path in TOKENIZER_NAMES)


def tokenizer_digest(files: Iterable[FileDigest]) -> str:
    """SHA-256 over tokenizer and chat template, in hexadecimal: equal digests mean equal token ids."""
    return files_digest(tokenizer_files(files))


def files_digest(files: Iterable[FileDigest]) -> str:
    """SHA-256 over names and contents, in hexadecimal: equal digests mean the same files, in any order."""
    ordered = sorted(files, key=lambda file: file.path)
    lines = "".join(f"{file.path}\0{file.sha256}\n" for file in ordered)
    return hashlib.sha256(lines.encode()).hexdigest()


async def find(
    files: Iterable[FileDigest], local_path: str, on_progress: Progress, known: KnownDigests
) -> Path | None:
    """Returns `local_path` where that is a directory that holds every one of `files`, else None.

    Args:
        files: What is wanted.
        local_path: A directory that may have it; empty: none.
        on_progress: Is told that all bytes are there, if they are.
        known: What was read before and has not been touched since is not read again.

    Raises:
        ArtifactInvalid: A file breaks a rule.
    """
    wanted = tuple(files)
    check_files(wanted)
    if not local_path:
        return None
    local = Path(local_path)
    if not await in_haltable_thread(lambda on_read: _has_all(local, wanted, known, on_read), "digests"):
        return None
    total = sum(file.size_bytes for file in wanted)
    on_progress(total, total)
    return local


async def fetch(
    files: Iterable[FileDigest],
    *,
    local_path: str,
    download: Download,
    directory: Path,
    on_progress: Progress,
    known: KnownDigests | None = None,
) -> Path:
    """Returns a directory that holds every one of `files`, with its digest checked.

    That is `local_path` where it has them all; otherwise `directory`, into which only what is missing is
    downloaded. A download that is cut off leaves its part behind, and the next call goes on from there.
    Nothing is written outside `directory`, and no file bears its name before its digest is right. Several
    processes may fetch into one directory: one works, the others wait and find the files.

    Args:
        files: What is wanted.
        local_path: A directory that may have it already; empty: none.
        download: Yields the bytes of a file from an offset on; what it raises passes through.
        directory: Where downloaded files are kept; it is made when missing.
        on_progress: Is told after each step how many bytes are there, of how many.
        known: What was read before and has not been touched since is not read again; None: everything is.

    Raises:
        ArtifactInvalid: A file breaks a rule, or what was downloaded is not what was wanted.
        InternalError: The disk is full.
    """
    wanted = tuple(files)
    known = known or KnownDigests()
    if local := await find(wanted, local_path, on_progress, known):
        return local
    total = sum(file.size_bytes for file in wanted)
    await asyncio.to_thread(lambda: directory.mkdir(parents=True, exist_ok=True))
    async with exclusive(directory):
        done = 0
        for file in wanted:
            start = done

            def report(file_done: int, start: int = start) -> None:
                on_progress(start + file_done, total)

            await _fetch_file(file, directory, download, report, known)
            done += file.size_bytes
            report(file.size_bytes)
    return directory


async def _fetch_file(
    file: FileDigest,
    directory: Path,
    download: Download,
    report: Callable[[int], None],
    known: KnownDigests,
) -> None:
    if await in_haltable_thread(lambda on_read: _has_all(directory, (file,), known, on_read), "digests"):
        return
    partial = PartialFile(directory / file.path, file.size_bytes, file.sha256)
    try:
        offset = await in_haltable_thread(partial.open, "digests")
        report(offset)
        chunks = download(file.path, offset)
        try:
            async for chunk in chunks:
                report(await in_thread(partial.append, chunk))
        finally:
            # A download that is left half way ends its call now, not when it is collected.
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
        await in_thread(partial.finish)
        known.note(directory / file.path, file.sha256)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        partial.discard()
        raise InternalError(f"{file.path}: the disk is full; {file.size_bytes} bytes are needed.") from None
    except ArtifactInvalid as error:
        partial.discard()
        raise ArtifactInvalid(
            f"{error.message} What the mesh keeps of it is damaged: delete the revision and push it again."
        ) from None
    finally:
        partial.close()


@contextlib.asynccontextmanager
async def exclusive(directory: Path) -> AsyncIterator[None]:
    """Holds the directory's advisory lock, which ends with the process and leaves no file behind."""
    with directory_descriptor(directory) as descriptor:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCK_POLL_S)
        yield


def _belongs(entry: os.DirEntry[str], directory: Path) -> bool:
    name = entry.name
    if name.startswith("."):
        return False
    if name.lower().endswith(REFUSED_SUFFIXES):
        raise ArtifactInvalid(f"{name!a}: files of this kind can run code and are never served; remove it.")
    if entry.is_symlink() and not _stays_inside(directory / name, directory):
        raise ArtifactInvalid(f"{name!a}: a link that leads out of the directory; put the file itself there.")
    if entry.is_dir():
        raise ArtifactInvalid(f"{name!a}: a model's files lie in one directory, without others inside it.")
    return name.endswith(ALLOWED_SUFFIXES)


def _stays_inside(link: Path, directory: Path) -> bool:
    try:
        return link.resolve(strict=True).parent == directory.resolve()
    except (OSError, RuntimeError):
        return False


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise ArtifactInvalid(f"{path.name!a}: cannot be read.") from None


def _describe_file(path: Path, on_read: Callable[[int], None]) -> FileDigest:
    _check_name(path.name)
    try:
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ArtifactInvalid(f"{path.name}: not a regular file.")
            if facts.st_size > _bytes_max(path.name):
                raise ArtifactInvalid(f"{path.name}: {facts.st_size} bytes; at most {_bytes_max(path.name)}.")
            return FileDigest(path.name, *read_digest(stream, on_read))
    except OSError:
        raise ArtifactInvalid(f"{path.name}: cannot be read.") from None


def _check_name(path: str) -> None:
    if (length := len(path.encode(errors="surrogatepass"))) > NAME_BYTES_MAX:
        raise ArtifactInvalid(
            f"{path[:64]!a}...: the name has {length} bytes; at most {NAME_BYTES_MAX}, rename the file."
        )
    if _NAME.fullmatch(path) is None:
        raise ArtifactInvalid(f"{path[:255]!a}: not a plain file name.")
    if not path.endswith(ALLOWED_SUFFIXES):
        raise ArtifactInvalid(f"{path}: only {', '.join(ALLOWED_SUFFIXES)} files make a revision.")


def _bytes_max(path: str) -> int:
    if path.endswith(".safetensors"):
        return WEIGHTS_BYTES_MAX
    if path == "tokenizer.json":
        return TOKENIZER_BYTES_MAX
    return CONFIG_BYTES_MAX if path.endswith("config.json") else TEXT_BYTES_MAX


def refuse_code(path: Path) -> None:
    """Refuses a configuration that names Python classes to import, at any depth."""
    try:
        pending: list[Any] = [json.loads(path.read_bytes())]
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid(f"{path.name}: not readable as JSON.") from None
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "auto_map" in value:
                raise ArtifactInvalid(f"{path.name}: `auto_map` names code to import; that is never run.")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _has_all(
    directory: Path, files: tuple[FileDigest, ...], known: KnownDigests, on_read: Callable[[int], None]
) -> bool:
    return directory.is_dir() and all(
        known.matches(directory / file.path, file.size_bytes, file.sha256, on_read) for file in files
    )
