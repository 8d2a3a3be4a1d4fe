"""Published keys. Owns: how an issuer's JWK set is read, from a file or a URL, and read again.

Where the set lies is the operator's word alone: no token changes what is opened or fetched. Reading never
blocks the event loop, and a set that cannot be read leaves the keys that are known in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from services.common import logs
from services.common.threads import begin_in_daemon
from services.common.token_keys import KeySetInvalid, PublishedKeys, read_key_set

# A key fills half a kilobyte; a megabyte would be somebody's mistake or attack.
KEY_SET_BYTES_MAX = 256 * 1024
# A key set in a file is a few kilobytes, and this machine's.
FILE_LOOK_S = 2.0
# Issuers publish a key long before they sign with it; one that does not is found by its unknown `kid`.
URL_LOOK_S = 300.0
# Tokens with invented `kid`s, and an issuer that is down, cause no more fetches than this allows.
URL_LOOK_MIN_S = 10.0
# A call with an unknown `kid` waits for the fetch, so it has to be short. No timeout bounds how long a name
# is looked up, and each address of it has its own, so a call that has waited for so long waits no more.
FETCH_TIMEOUT_S = 3.0
# Whoever calls may name a `kid`, without being anybody: that must not fill the process with calls that wait.
WAITING_MAX = 64
_READ_BYTES = 16 * 1024


class KeySetUnreadable(Exception):
    """The set cannot be read now; the message says why, without its address."""


class KeySource(Protocol):
    """Where a JWK set lies.

    Attributes:
        look_s: Seconds between two looks.
        look_min_s: Fewest seconds between two looks, however many ask.
    """

    look_s: float
    look_min_s: float

    def read(self) -> bytes:
        """The document; blocks. Raises KeySetUnreadable."""
        ...


class KeySetFile:
    """A JWK set in a file, which may change or be replaced."""

    look_s = look_min_s = FILE_LOOK_S

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes:
        """See `KeySource.read`."""
        try:
            with self._path.open("rb") as file:
                return _bounded(file.read(KEY_SET_BYTES_MAX + 1))
        except OSError as error:
            raise KeySetUnreadable(f"the file cannot be read ({error.strerror})") from None


class KeySetUrl:
    """A JWK set behind an `https` URL; `http` reaches this machine alone, unless allowed.

    Redirects are not followed and no proxy is asked: what is named is what is read.

    Raises:
        ValueError: It is no such URL; the message says why.
    """

    look_s, look_min_s = URL_LOOK_S, URL_LOOK_MIN_S

    def __init__(self, url: str, *, http_allowed: bool = False, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        self._parts = _checked_url(url, http_allowed=http_allowed)
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None

    def read(self) -> bytes:
        """See `KeySource.read`."""
        connection = self._connection()
        try:
            return self._fetch(connection)
        # A name that no resolver can be asked for is a ValueError.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KeySetUnreadable(f"the issuer cannot be reached ({type(error).__name__})") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)

    def _fetch(self, connection: http.client.HTTPConnection) -> bytes:
        ends_s = time.monotonic() + self._timeout_s
        target = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
        headers = {"accept": "application/json", "connection": "close", "user-agent": "interlock"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status != http.client.OK:
                raise KeySetUnreadable(f"the issuer answers with status {response.status}")
            document = b""
            # The socket's timeout bounds each piece, and this the whole: a server may trickle.
            while piece := response.read1(_READ_BYTES):
                document = _bounded(document + piece)
                if time.monotonic() > ends_s:
                    raise KeySetUnreadable("the issuer is too slow")
        return document


class KeyFollower:
    """Keeps the keys that are believed in step with their source.

    A look is nobody's: calls wait for it, and one that is cancelled neither ends it nor keeps what it read
    from being believed.

    Args:
        source: Where they are published.
        keys: What tokens are judged by.
        monotonic: Seconds that never go back.
    """

    def __init__(self, source: KeySource, keys: PublishedKeys, monotonic: Callable[[], float]) -> None:
        self._source = source
        self._keys = keys
        self._monotonic = monotonic
        self._taken = b""
        self._looked_s = float("-inf")
        self._failed = False
        self._looking: asyncio.Task[None] | None = None
        self._waiting = 0

    async def run(self) -> None:
        """Looks again and again, whoever else did; a source that failed is asked sooner."""
        try:
            while True:
                await asyncio.sleep(self._source.look_min_s if self._failed else self._source.look_s)
                await self._look()
        finally:
            if self._looking is not None:
                self._looking.cancel()
                await asyncio.wait({self._looking})

    async def learn(self, key_id: str | None) -> None:
        """Looks once for a key that is not known, unless somebody has looked just now.

        It may still be unknown afterwards: nobody waits longer than a look should take, and of those who come
        while many wait, nobody does.
        """
        if self._keys.knows(key_id) or self._waiting >= WAITING_MAX:
            return
        looked_ago_s = self._monotonic() - self._looked_s
        if self._looking is not None or looked_ago_s >= self._source.look_min_s:
            self._waiting += 1
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FETCH_TIMEOUT_S):
                        await self._look()
            finally:
                self._waiting -= 1

    async def load(self) -> None:
        """The first look, at the start.

        Raises:
            KeySetInvalid: There is a document, and no key in it can be used.
            KeySetUnreadable: There is none.
        """
        try:
            document = await self._document()
        except KeySetUnreadable:
            self._failed = True
            raise
        finally:
            self._looked_s = self._monotonic()
        if not self._take(document):
            raise KeySetInvalid(f"no usable key for {self._keys.algorithm} in it")

    async def _look(self) -> None:
        """Waits for the look that is under way, or for a new one."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(
                self._read(), name="key-look", context=logs.process_context()
            )
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def _looked(self, _: asyncio.Task[None]) -> None:
        # From its end on: one that took long is not followed at once by another.
        self._looking, self._looked_s = None, self._monotonic()

    async def _read(self) -> None:
        try:
            document = await self._document()
            # What was refused is refused again, so that the source still counts as failed.
            if document != self._taken:
                self._take(document)
            self._failed = False
        except (KeySetUnreadable, KeySetInvalid) as error:
            self._failed = True
            logs.get_logger().warning("keys.unread", reason=str(error))

    def _document(self) -> asyncio.Future[bytes]:
        """Reads in a thread that the end of the process does not wait for: nobody knows when it ends."""
        return begin_in_daemon(self._source.read, "key-look")

    def _take(self, document: bytes) -> int:
        """Believes the keys of a document, and only them; returns how many they are."""
        found = read_key_set(document, self._keys.algorithm)
        self._keys.replace(found)
        self._taken = document
        logs.get_logger().info("keys.read", keys=len(found), key_ids=sorted(found.by_id))
        for reason in found.skipped:
            logs.get_logger().warning("key.skipped", reason=reason)
        return len(found)


def source_of(place: str, *, http_allowed: bool) -> KeySource:
    """The source that a setting names: a URL, or the path of a file. Raises ValueError."""
    if "://" in place:
        return KeySetUrl(place, http_allowed=http_allowed)
    return KeySetFile(Path(place))


def _bounded(document: bytes) -> bytes:
    if len(document) > KEY_SET_BYTES_MAX:
        raise KeySetUnreadable(f"it is larger than {KEY_SET_BYTES_MAX} bytes")
    return document


def _checked_url(url: str, *, http_allowed: bool) -> SplitResult:
    parts = urlsplit(url)
    # Reading the port raises ValueError where it is none.
    if parts.scheme not in {"https", "http"} or not parts.hostname or parts.port == 0:
        raise ValueError("expected https://HOST/PATH, or the path of a file")
    if parts.username is not None or any(not "!" <= character <= "~" for character in url):
        raise ValueError("expected a URL without user, blanks and characters outside of ASCII")
    if parts.scheme == "http" and not http_allowed and not _is_loopback(parts.hostname):
        raise ValueError(
            "http is for this machine alone, because anybody on the way can change keys; use https"
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
