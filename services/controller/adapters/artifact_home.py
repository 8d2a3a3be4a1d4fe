"""Where a model's revisions are at home when that is no directory of ours. Owns: what lies where at the URL.

    MODEL/format.json                    says that this is such a home, and of which layout
    MODEL/blobs/sha256/ab/abcdef...      each content once
    MODEL/revisions/REVISION.json        the record of a revision: by it alone the revision exists
    MODEL/rollouts/ID.NUMBER.json        a rollout, as the controller with this fencing number left it

A mesh leads one model, by a lease of that model; so what lies below MODEL is changed by the holder of that
lease, and by nobody else. Must not know: leases, or what this machine has of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from services.common import logs
from services.common.errors import ArgumentInvalid, ArtifactInvalid, RevisionInUse, StoreUnavailable
from services.controller.adapters.artifact_store import CALLS_AT_ONCE_MAX, ArtifactStore, StoredObject
from services.controller.adapters.revision_records import RECORD_BYTES_MAX, decode, encode
from services.controller.core.catalog import Manifest, Revision

FORMAT = 1
# The place of what is in the store alone.
NOWHERE = ""
# Longer than anybody scrolls, and read within a minute.
RECORDS_MAX = 10_000

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Records:
    """What records there are.

    Attributes:
        revisions: Those that could be read, oldest first; their files are nowhere on this machine.
        unreadable: The names of those that could not be: nobody knows which contents they name.
    """

    revisions: tuple[Revision, ...]
    unreadable: frozenset[str]


class ArtifactHome:
    """The home of one model's revisions. Every method raises StoreUnavailable when the store does not answer.

    Args:
        store: The objects.
        model: The model; its name is the first part of each name.

    Attributes:
        model: The same.
    """

    def __init__(self, store: ArtifactStore, model: str) -> None:
        self._store = store
        self.model = model
        # At most one entry for each content that was there.
        self._damaged: set[str] = set()

    @property
    def identity(self) -> str:
        """A name of this home that says nothing of it."""
        return f"{self._store.identity}/{self.model}"

    async def enter(self, *, is_known: bool) -> None:
        """Looks whether this is a home, and makes it one.

        Args:
            is_known: Whether it must have been one already: copies of what it holds are here.

        Raises:
            StoreUnavailable: It has another layout, or is none any more.
        """
        # Another leader may have mended what was damaged.
        self._damaged.clear()
        name = f"{self.model}/format.json"
        size_bytes = await self._store.size(name)
        if size_bytes is None:
            if is_known:
                raise StoreUnavailable(
                    "Nothing is at the artifacts' URL that has held revisions: see that it is the right one,"
                    " and mounted where it is a directory. To begin anew there, use another URL."
                )
            await self._store.create(name, json.dumps({"format": FORMAT}).encode())
            return
        text = await self._store.read(name, 0, min(size_bytes, RECORD_BYTES_MAX))
        if text is None or _format_of(text) != FORMAT:
            raise StoreUnavailable(
                "What is at the artifacts' URL has a layout that this version does not know; update it."
            )

    async def records(self) -> Records:
        """Every revision that exists; what is damaged is named in the log and passed over."""
        objects = await self._store.names(f"{self.model}/revisions")
        sizes = {name.removesuffix(_SUFFIX): facts.size_bytes for name, facts in sorted(objects.items())}
        names = list(sizes)
        found, unreadable = [], set(names[RECORDS_MAX:])
        for at in range(0, min(len(names), RECORDS_MAX), CALLS_AT_ONCE_MAX):
            some = names[at : at + CALLS_AT_ONCE_MAX]
            records = await asyncio.gather(
                *(self._record(one, sizes[one]) for one in some), return_exceptions=True
            )
            for revision, one in zip(some, records, strict=True):
                if isinstance(one, ArtifactInvalid | ArgumentInvalid):
                    unreadable.add(revision)
                    logs.get_logger().error(
                        "revision.unreadable", model=self.model, revision=revision, error=one.message
                    )
                elif isinstance(one, BaseException):
                    raise one
                elif one is not None:
                    found.append(one)
        order = sorted(found, key=lambda one: (one.create_time_s, one.manifest.revision))
        return Records(tuple(order), frozenset(unreadable))

    async def check(self) -> None:
        """Raises StoreUnavailable where nothing is, as below a directory that is not mounted."""
        if await self._store.size(f"{self.model}/format.json") is None:
            raise StoreUnavailable("Nothing is at the artifacts' URL that has held revisions.")

    async def rollouts(self) -> Mapping[str, StoredObject]:
        """What there is of rollouts, by the names of the objects."""
        await self.check()
        return await self._store.names(f"{self.model}/rollouts")

    async def read_rollout(self, name: str, size_bytes: int) -> bytes | None:
        """One of them; None: it is gone."""
        return await self._store.read(f"{self.model}/rollouts/{name}", 0, size_bytes)

    async def put_rollout(self, name: str, text: bytes) -> None:
        """Writes one of them."""
        await self.check()
        await self._store.replace(f"{self.model}/rollouts/{name}", text)

    async def drop_rollout(self, name: str) -> None:
        """Removes one of them; without effect where it is gone."""
        await self._store.remove(f"{self.model}/rollouts/{name}")

    async def keep(self, contents: Mapping[str, Path]) -> None:
        """Sees that each of these contents is there whole; by their digests, with a file that has each.

        Raises:
            OSError: A file cannot be read.
        """
        for sha256, path in contents.items():
            size_bytes = path.stat().st_size
            name = self._blob(sha256)
            if sha256 in self._damaged or await self._store.size(name) != size_bytes:
                await self._store.put(name, path)
                self._damaged.discard(sha256)

    async def give_name(self, revision: Revision) -> Revision:
        """Has a revision exist; its contents are there. Returns it as it is registered, perhaps since before.

        Raises:
            RevisionInUse: Another one bears its name.
        """
        manifest = revision.manifest
        name, text = self._name(manifest.revision), encode(manifest, revision.create_time_s)
        if await self._store.create(name, text):
            return revision
        try:
            found = await self._record(manifest.revision, await self._store.size(name) or 0)
        except (ArtifactInvalid, ArgumentInvalid):
            found = None
        if found is None:
            # A record that is none: somebody was cut off while it was written.
            await self._store.replace(name, text)
            return revision
        if found.manifest != manifest:
            raise RevisionInUse(
                f"The revision {manifest.revision} exists at the artifacts' URL with other content; choose"
                " another name."
            )
        return replace(revision, create_time_s=found.create_time_s)

    async def take_name(self, manifest: Manifest) -> bool:
        """Has a revision exist no more; False: it did not."""
        return await self._store.remove(self._name(manifest.revision))

    async def contents(self) -> Mapping[str, StoredObject]:
        """The contents that are there, by their digests."""
        return await self._store.all_below(f"{self.model}/blobs")

    async def drop(self, sha256: str) -> None:
        """Removes a content."""
        await self._store.remove(self._blob(sha256))
        self._damaged.discard(sha256)

    def is_damaged(self, sha256: str) -> bool:
        """Whether a content was found damaged there: it comes again with the next upload that needs it."""
        return sha256 in self._damaged

    def tell_damaged(self, sha256: str) -> None:
        """Says that a content is not what its name says."""
        logs.get_logger().error("artifacts.damaged", sha256=sha256)
        self._damaged.add(sha256)

    async def size(self, sha256: str) -> int | None:
        """How long a content is; None: it is not there."""
        return await self._store.size(self._blob(sha256))

    def read(self, sha256: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yields a content's bytes; ends early where it is gone."""
        return self._store.read_all(self._blob(sha256), start, end)

    async def _record(self, revision: str, size_bytes: int) -> Revision | None:
        """One revision; None: it is gone.

        Raises:
            ArtifactInvalid, ArgumentInvalid: The record is damaged.
        """
        if size_bytes > RECORD_BYTES_MAX:
            raise ArtifactInvalid(f"The record has {size_bytes} bytes; at most {RECORD_BYTES_MAX}.")
        text = await self._store.read(self._name(revision), 0, size_bytes)
        if text is None:
            return None
        manifest, create_time_s = decode(text, self.model, revision)
        return Revision(manifest, NOWHERE, create_time_s)

    def _name(self, revision: str) -> str:
        return f"{self.model}/revisions/{revision}{_SUFFIX}"

    def _blob(self, sha256: str) -> str:
        return f"{self.model}/blobs/sha256/{sha256[:2]}/{sha256}"


def digests_of(revisions: Iterable[Revision]) -> set[str]:
    """The contents that these revisions have."""
    return {file.sha256 for revision in revisions for file in revision.manifest.files}


def _format_of(text: bytes) -> object:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found.get("format") if isinstance(found, dict) else None
