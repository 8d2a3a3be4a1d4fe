"""Directories of revisions that were uploaded. Owns: how one appears whole, is read again, and goes.

    MODEL/REVISION/          the files by name, and manifest.json; .home where it is kept elsewhere too
    MODEL/.REVISION.N.new    one on its way in
    MODEL/.REVISION.N.gone   one on its way out

A directory has its name only when every file is there and every header was read: whoever sees it can load it.
Several controllers share the place, and one of the past may still be at work: what it composes has a name of
its own, and takes no name that has been given meanwhile.
Must not know: the catalog, or how bytes arrive. Everything blocks where nothing else is said.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.common import artifacts, logs, safetensors_files
from services.common.clock import Clock
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.common.partial_file import PartialFile, make_directory, sync_directory
from services.controller.adapters.local_revisions import CHUNK_BYTES_MAX, context_tokens_of
from services.controller.adapters.manifest_checks import RECORD_NAME
from services.controller.adapters.revision_records import RECORD_BYTES_MAX, decode, encode
from services.controller.core.catalog import Manifest, ModelFile, Revision

# Stands in a directory whose revision is kept elsewhere too: where. No file of a manifest is named so.
HOME_NAME = ".home"


@dataclass(frozen=True, slots=True)
class Composed:
    """A directory without its name, and the revision that it will be."""

    directory: Path
    revision: Revision


class RevisionDirectories:
    """The revisions in one directory.

    Args:
        directory: Where they are; made when the first one comes.
        clock: The time.
        home: Where the revisions are kept that are made here: a name of that place; empty: here alone.
    """

    def __init__(self, directory: Path, clock: Clock, *, home: str = "") -> None:
        self._directory = directory
        self._clock = clock
        self._home = home
        # Two that remove one directory trip over one another.
        self._clearing = threading.Lock()

    def holds(self, revision: Revision) -> bool:
        """Whether a revision's files are in a directory of ours. Does not block for long."""
        manifest = revision.manifest
        return Path(revision.local_path) == self._path(manifest.model, manifest.revision).resolve()

    def compose(
        self, manifest: Manifest, blob_of: Callable[[ModelFile], Path], *, create_time_s: float | None = None
    ) -> Composed:
        """Makes the revision's directory, and reads everything but its tokenizer; it has no name yet.

        Args:
            manifest: The revision.
            blob_of: Where each file's content is.
            create_time_s: When it was registered, in seconds since the epoch; None: now.

        Raises:
            ArtifactInvalid: A header or a configuration breaks a rule.
            OSError: It cannot be written.
        """
        final = self._path(manifest.model, manifest.revision)
        fresh = final.with_name(f".{manifest.revision}.{secrets.token_hex(4)}.new")
        make_directory(final.parent)
        fresh.mkdir()
        try:
            for file in manifest.files:
                _link(blob_of(file), fresh / file.path, file)
            _check_content(fresh, manifest)
            create_time_s = self._clock.now() if create_time_s is None else create_time_s
            revision = Revision(manifest, str(final.resolve()), create_time_s)
            with (fresh / RECORD_NAME).open("wb") as stream:
                stream.write(encode(manifest, revision.create_time_s))
                stream.flush()
                os.fsync(stream.fileno())
            if self._home:
                (fresh / HOME_NAME).write_text(self._home)
            # What was answered for is there after the power fails: first what is inside, then its name.
            sync_directory(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return Composed(fresh, revision)

    def place(self, composed: Composed) -> None:
        """Gives a directory its name; what is no revision of ours and bears it is buried.

        Raises:
            OSError: It cannot, or somebody else has just given the name.
        """
        final = self._path(composed.revision.manifest.model, composed.revision.manifest.revision)
        with contextlib.suppress(FileNotFoundError):
            _bury(final)
        # Fails where there is a directory again: another controller leads, and has made it.
        composed.directory.replace(final)
        sync_directory(final.parent)
        sync_directory(self._directory)

    def discard(self, composed: Composed) -> None:
        """Removes a directory that gets no name."""
        shutil.rmtree(composed.directory, ignore_errors=True)

    def read_all(self) -> list[Revision]:
        """What was taken in before, oldest first; what is damaged is named in the log and passed over."""
        for left in self._directory.glob("*/.*"):
            # A crash left it on its way in or out.
            _remove(left)
        found = []
        for directory in self._directory.glob("*/*"):
            try:
                found.append(_read(directory))
            except (ArtifactInvalid, ArgumentInvalid) as error:
                logs.get_logger().error(
                    "revision.unreadable",
                    model=directory.parent.name,
                    revision=directory.name,
                    error=error.message,
                )
        return sorted(found, key=lambda one: (one.create_time_s, one.manifest.revision))

    def bury(self, revision: Revision) -> None:
        """Takes a revision's name away, in one step that either happens or does not. Does not block for long.

        Raises:
            OSError: It does not; everything is as it was.
        """
        _bury(self._path(revision.manifest.model, revision.manifest.revision))

    def path_of(self, manifest: Manifest) -> str:
        """Where a revision's directory is, or would be."""
        return str(self._path(manifest.model, manifest.revision).resolve())

    def has(self, manifest: Manifest) -> bool:
        """Whether a directory bears a revision's name, whatever is in it."""
        return self._path(manifest.model, manifest.revision).exists()

    def is_copy(self, revision: Revision) -> bool:
        """Whether a directory says that its revision is kept at our home too: then it is a copy."""
        try:
            return bool(self._home) and (Path(revision.local_path) / HOME_NAME).read_text() == self._home
        except (OSError, UnicodeDecodeError):
            return False

    def mark_copy(self, revision: Revision) -> None:
        """Has a directory say that its revision is kept at our home too."""
        (Path(revision.local_path) / HOME_NAME).write_text(self._home)

    def make_way(self, manifest: Manifest) -> None:
        """Takes a name from a directory that is not this revision's; one that is no copy is kept, aside."""
        path = self._path(manifest.model, manifest.revision)
        if not path.exists():
            return
        if self.is_copy(Revision(manifest, str(path), 0.0)):
            _bury(path)
            return
        aside = path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}")
        path.rename(aside)
        logs.get_logger().error(
            "revision.name_taken", model=manifest.model, revision=manifest.revision, kept_as=aside.name
        )

    def clear(self) -> None:
        """Removes what was buried, now and before; what cannot be removed is logged, for the next time."""
        with self._clearing:
            for gone in self._directory.glob("*/.*.gone"):
                _remove(gone)

    def _path(self, model: str, revision: str) -> Path:
        return self._directory / model / revision


def _read(directory: Path) -> Revision:
    """A revision that was taken in before.

    Raises:
        ArtifactInvalid, ArgumentInvalid: It is damaged, or not what was taken in.
    """
    try:
        facts = (directory / RECORD_NAME).lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > RECORD_BYTES_MAX:
            raise ArtifactInvalid(f"{RECORD_NAME}: no file of at most {RECORD_BYTES_MAX} bytes.")
        text = (directory / RECORD_NAME).read_bytes()
    except OSError:
        raise ArtifactInvalid(f"{RECORD_NAME}: missing, or cannot be read.") from None
    manifest, create_time_s = decode(text, directory.parent.name, directory.name)
    for file in manifest.files:
        _check_whole(directory / file.path, file)
    return Revision(manifest, str(directory.resolve()), create_time_s)


def _check_whole(path: Path, file: ModelFile) -> None:
    try:
        facts = path.lstat()
    except OSError:
        raise ArtifactInvalid(f"{file.path}: missing.") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_size != file.size_bytes:
        raise ArtifactInvalid(f"{file.path}: no file of {file.size_bytes} bytes.")


def _check_content(directory: Path, manifest: Manifest) -> None:
    """Reads what is read before weights: a worker would refuse it, or run what it says.

    Not the tokenizer: the library that reads it would keep everybody else from running.
    """
    names = [file.path for file in manifest.files]
    config = safetensors_files.read_config(directory)
    context_tokens_of(config, manifest.context_tokens)
    safetensors_files.check_counts(config, safetensors_files.check_files(directory, names))
    for name in names:
        if name.endswith("config.json"):
            artifacts.refuse_code(directory / name)


def _bury(path: Path) -> None:
    # A name that nothing has: what an earlier attempt could not remove is in nobody's way.
    path.replace(path.with_name(f".{path.name}.{secrets.token_hex(4)}.gone"))


def _link(source: Path, target: Path, file: ModelFile) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without links, or a content that a thousand revisions have.
        copy = PartialFile(target, file.size_bytes, file.sha256)
        try:
            copy.open()
            with source.open("rb") as stream:
                while data := stream.read(CHUNK_BYTES_MAX):
                    copy.append(data)
            copy.finish()
        finally:
            copy.close()


def _remove(directory: Path) -> None:
    try:
        # That it has no name any more is durable before it is half gone.
        sync_directory(directory.parent)
        shutil.rmtree(directory)
    except OSError as error:
        logs.get_logger().warning("revision.left_behind", directory=directory.name, error=str(error))
