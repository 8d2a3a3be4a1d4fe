"""A store of objects at a URL, by fsspec. Owns: its calls' bounds and repetitions, and what of it is told.

Every implementation has exceptions of its own; here they become `StoreUnavailable`, or an answer. Credentials
are the implementation's business, and a URL may hold one: neither it nor what stands in it is ever logged.
Must not know: what the objects are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec

from services.common import logs
from services.common.config import ConfigInvalid
from services.common.errors import StoreUnavailable
from services.common.threads import MayHang

T = TypeVar("T")

# More at once fill no line better, and a store that hangs holds no more threads than this.
CALLS_AT_ONCE_MAX = 16
# A call moves at most one range, or a page of names; who takes longer for that does not answer.
CALL_TIMEOUT_S = 30.0
# A file is sent in one call, and the slowest line that a model is sent over still makes a megabyte a second.
PUT_BYTES_PER_S_MIN = 1 << 20
# A store that restarts is back within seconds; what passes sooner, implementations repeat themselves.
PAUSES_S = (0.5, 2.0)
RETRY_AFTER_S = 5.0
# Large enough that a request's latency is a small part, small enough for several in memory at once.
RANGE_BYTES = 8 << 20
RANGES_AHEAD = 4
# What a log line says of a foreign error.
_TEXT_CHARS_MAX = 300
# How implementations call the time of the last change.
_MODIFIED_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object: its size, and when it was last written, in seconds since the epoch; None: nobody says."""

    size_bytes: int
    modified_s: float | None


class ArtifactStore:
    """The objects below one URL, by names with slashes.

    Args:
        url: `PROTOCOL://...` of any fsspec implementation.
        pauses_s: How long to wait before each repetition of a call.
        call_timeout_s: How long one call may take.

    Raises:
        ConfigInvalid: The URL has another form, or the implementation of its protocol is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        _check(url)
        self._url = url
        self._secrets = _secrets_of(url)
        self._pauses_s = pauses_s
        self._timeout_s = call_timeout_s
        self._calls = MayHang(CALLS_AT_ONCE_MAX)
        self._guard = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    @property
    def identity(self) -> str:
        """A name of the place that says nothing of it, and is the same with another password."""
        parts = urlsplit(self._url)
        plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return hashlib.sha256(plain.encode()).hexdigest()

    async def names(self, directory: str) -> dict[str, StoredObject]:
        """The objects right below `directory`, by the rest of their names; none where it is not there."""

        def work(fs: Any, root: str) -> dict[str, StoredObject]:
            try:
                found = fs.ls(f"{root}/{directory}", detail=True)
            except FileNotFoundError:
                return {}
            return {one["name"].rpartition("/")[2]: _object(one) for one in found if one["type"] == "file"}

        return await self._call("list", work)

    async def all_below(self, directory: str) -> dict[str, StoredObject]:
        """The objects below `directory`, at any depth; what cannot be listed may be left out."""

        def work(fs: Any, root: str) -> dict[str, StoredObject]:
            found = fs.find(f"{root}/{directory}", detail=True)
            return {name.rpartition("/")[2]: _object(one) for name, one in found.items()}

        return await self._call("list", work)

    async def size(self, name: str) -> int | None:
        """How long an object is; None: there is none."""

        def work(fs: Any, root: str) -> int | None:
            try:
                facts = fs.info(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return int(facts["size"]) if facts["type"] == "file" else None

        return await self._call("look", work)

    async def read(self, name: str, start: int, end: int) -> bytes | None:
        """The bytes of an object from `start` to before `end`; None: there is no such object."""

        def work(fs: Any, root: str) -> bytes | None:
            try:
                data = bytes(fs.cat_file(f"{root}/{name}", start=start, end=end)) if end > start else b""
            except FileNotFoundError:
                return None
            if len(data) != end - start:
                raise EOFError(f"{len(data)} of {end - start} bytes came")
            return data

        return await self._call("read", work)

    async def read_all(self, name: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yields the same in pieces, some of which are read ahead; ends early where the object is gone."""
        coming: deque[asyncio.Task[bytes | None]] = deque()
        try:
            while coming or start < end:
                while start < end and len(coming) < RANGES_AHEAD:
                    stop = min(end, start + RANGE_BYTES)
                    coming.append(asyncio.create_task(self.read(name, start, stop)))
                    start = stop
                data = await coming[0]
                coming.popleft()
                if data is None:
                    return
                yield data
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)

    async def put(self, name: str, path: Path) -> None:
        """Makes an object of a file, in place of what bears the name."""
        size_bytes = await asyncio.to_thread(lambda: path.stat().st_size)

        def work(fs: Any, root: str) -> None:
            target = f"{root}/{name}"
            _with_parents(fs, target, lambda: fs.put_file(os.fspath(path), target))
            if (came := fs.info(target)["size"]) != size_bytes:
                raise EOFError(f"{came} of {size_bytes} bytes arrived")

        await self._call("put", work, timeout_s=self._timeout_s + size_bytes / PUT_BYTES_PER_S_MIN)

    async def create(self, name: str, data: bytes) -> bool:
        """Makes an object; False, and nothing has changed, where one bears the name already.

        A repetition may find what the call before it made.
        """

        def work(fs: Any, root: str) -> bool:
            target = f"{root}/{name}"
            with contextlib.suppress(FileExistsError):
                _with_parents(fs, target, lambda: fs.pipe_file(target, data, mode="create"))
                return True
            return False

        return await self._call("create", work)

    async def replace(self, name: str, data: bytes) -> None:
        """Makes an object, in place of what bears the name."""

        def work(fs: Any, root: str) -> None:
            target = f"{root}/{name}"
            _with_parents(fs, target, lambda: fs.pipe_file(target, data))

        await self._call("put", work)

    async def remove(self, name: str) -> bool:
        """Removes an object; False: there was none."""

        def work(fs: Any, root: str) -> bool:
            try:
                fs.rm_file(f"{root}/{name}")
            except FileNotFoundError:
                return False
            return True

        return await self._call("remove", work)

    async def _call(self, what: str, work: Callable[[Any, str], T], *, timeout_s: float | None = None) -> T:
        """Calls `work` in a thread, with the file system and its root, again where it fails.

        Raises:
            StoreUnavailable: It failed each time.
        """
        for pause_s in (*self._pauses_s, None):
            try:
                return await self._calls.call(timeout_s or self._timeout_s, lambda: work(*self._open()))
            except PermissionError as error:
                self._log(what, error)
                raise StoreUnavailable(
                    "The store at the artifacts' URL refuses the controller's credentials: see that they may"
                    " list, read, write and delete there, and try again."
                ) from None
            except Exception as error:  # noqa: BLE001 - each implementation has exceptions of its own
                self._log(what, error)
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        raise StoreUnavailable(
            "The store at the artifacts' URL does not answer, or not in time. What came so far is kept: see"
            " `artifacts.failed` in the controller's log, and try again.",
            retry_after_s=RETRY_AFTER_S,
        )

    def _open(self) -> tuple[Any, str]:
        """The file system and its root; made in a thread, for some ask the network for credentials."""
        with self._guard:
            if self._opened is None:
                # Others write there too: what was listed a minute ago says nothing.
                options = {"use_listings_cache": False, "skip_instance_cache": True}
                fs, root = fsspec.core.url_to_fs(self._url, **options)
                self._opened = (fs, root.rstrip("/"))
            return self._opened

    def _log(self, what: str, error: BaseException) -> None:
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        logs.get_logger().warning(
            "artifacts.failed", call=what, error=type(error).__name__, text=text[:_TEXT_CHARS_MAX]
        )


def _check(url: str) -> None:
    protocol, separator, rest = url.partition("://")
    if not separator or not rest or "::" in url:
        raise ConfigInvalid("artifacts_url: must be PROTOCOL://..., such as s3://bucket/prefix; no chain.")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise ConfigInvalid("artifacts_url: fsspec knows no such protocol.") from None
    except ImportError as error:
        missing = "s3fs (pip install 'interlock[s3]')" if protocol in {"s3", "s3a"} else str(error)
        raise ConfigInvalid(f"artifacts_url: its protocol needs a package: {missing}") from None


def _secrets_of(url: str) -> tuple[str, ...]:
    """What in a URL may be a secret, as it stands there and as it is meant; the longest first."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    found = {user, user.partition(":")[2], parts.query, *(value for _, value in parse_qsl(parts.query))}
    meant = found | {unquote(one) for one in found}
    return tuple(sorted((one for one in meant if one), key=len, reverse=True))


def _with_parents(fs: Any, target: str, write: Callable[[], object]) -> None:
    """Writes; makes the directory above first where there is none, and the store has such a thing."""
    try:
        write()
    except FileNotFoundError:
        # Object stores, which are the ones that are called asynchronously, have none: a mistyped bucket
        # would be made, and filled.
        if fs.async_impl:
            raise
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        write()


def _object(facts: Mapping[str, Any]) -> StoredObject:
    return StoredObject(int(facts["size"] or 0), _modified_s(facts))


def _modified_s(facts: Mapping[str, Any]) -> float | None:
    for key in _MODIFIED_KEYS:
        value = facts.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
