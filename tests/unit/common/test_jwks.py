"""Published keys: read from a file or a URL, read again, and never because a token says so."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from services.common.jwks import (
    KEY_SET_BYTES_MAX,
    KeyFollower,
    KeySetFile,
    KeySetUnreadable,
    KeySetUrl,
    source_of,
)
from services.common.token_keys import KeySet, KeySetInvalid, PublishedKeys
from tests.fakes.key_server import key_server
from tests.fakes.key_sources import FakeSource, Following, SlowSource
from tests.fixtures.token_forge import key_set, signing_key

FIRST, SECOND = signing_key("EdDSA", 0), signing_key("EdDSA", 1)
FIRST_ID, SECOND_ID = FIRST.jwk["kid"], SECOND.jwk["kid"]


class WatchedKeys(PublishedKeys):
    """Keys that tell when one of them comes."""

    def __init__(self, algorithm: str, key_id: str) -> None:
        super().__init__(algorithm)
        self.seen = asyncio.Event()
        self._awaited_id = key_id

    def replace(self, keys: KeySet) -> None:
        """See `PublishedKeys.replace`."""
        super().replace(keys)
        if self.knows(self._awaited_id):
            self.seen.set()


def written(path: Path, document: bytes) -> Path:
    """A file that replaced another one, as configuration systems do it."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(document)
    temporary.replace(path)
    return path


async def test_a_replaced_file_is_followed(tmp_path: Path) -> None:
    """A new key is believed once it is in the file, and a withdrawn one no longer."""
    path = written(tmp_path / "jwks.json", key_set(FIRST))
    following = Following(KeySetFile(path))
    await following.follower.load()
    assert following.known(FIRST_ID)
    written(path, key_set(SECOND))
    following.time_s = 2.0
    await following.follower.learn(SECOND_ID)
    assert following.known(SECOND_ID)
    assert not following.known(FIRST_ID)


async def test_a_set_is_believed_again_only_when_it_changed(tmp_path: Path) -> None:
    """Until then nothing is replaced, and no line logged; a change in place counts too."""
    path = written(tmp_path / "jwks.json", key_set(FIRST))
    following = Following(KeySetFile(path))
    with capture_logs() as lines:
        await following.follower.load()
        for time_s, document in ((2.0, key_set(FIRST)), (4.0, key_set(FIRST, SECOND))):
            path.write_bytes(document)
            following.time_s = time_s
            await following.follower.learn(SECOND_ID)
    assert following.known(FIRST_ID, SECOND_ID)
    assert [line["keys"] for line in lines if line["event"] == "keys.read"] == [1, 2]


def test_an_unreadable_file_is_told_without_its_path(tmp_path: Path) -> None:
    """Missing, a directory, or far too large."""
    large = tmp_path / "large"
    large.write_bytes(b" " * (KEY_SET_BYTES_MAX + 1))
    for path in (tmp_path / "absent", tmp_path, large):
        with pytest.raises(KeySetUnreadable) as caught:
            KeySetFile(path).read()
        assert str(tmp_path) not in str(caught.value)


def test_a_url_is_fetched_with_its_query() -> None:
    """What is named is asked for."""
    with key_server(key_set(FIRST)) as issuer:
        source = KeySetUrl(issuer.url)
        assert source.read() == key_set(FIRST)
        assert issuer.requests == ["/keys?v=1"]


def certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for this machine that vouches for itself, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    public, private = directory / "issuer.crt", directory / "issuer.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


def test_https_believes_certificates_that_the_machine_believes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not who the name says publishes no keys of ours."""
    public, tls = certificate(tmp_path)
    with key_server(key_set(FIRST), tls) as issuer:
        with pytest.raises(KeySetUnreadable, match="SSLCertVerificationError"):
            KeySetUrl(issuer.url).read()
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        assert KeySetUrl(issuer.url).read() == key_set(FIRST)
        with pytest.raises(KeySetUnreadable, match="SSLCertVerificationError"):
            KeySetUrl(issuer.url.replace("127.0.0.1", "localhost")).read()


@pytest.mark.parametrize("status", [302, 404, 500, 204])
def test_any_other_answer_is_no_key_set(status: int) -> None:
    """A redirect is not followed either: who can send one could send anywhere."""
    with key_server(b"" if status == 204 else key_set(FIRST)) as issuer:
        issuer.status = status
        with pytest.raises(KeySetUnreadable, match=str(status)):
            KeySetUrl(issuer.url).read()
        assert len(issuer.requests) == 1


def test_an_answer_is_bounded_in_size_and_time() -> None:
    """Too large, and one byte after another for ever: both end."""
    with key_server(b" " * (KEY_SET_BYTES_MAX + 1)) as issuer:
        with pytest.raises(KeySetUnreadable, match="larger"):
            KeySetUrl(issuer.url).read()
        issuer.document, issuer.trickle_s = b" " * 40, 0.02
        with pytest.raises(KeySetUnreadable, match="slow"):
            KeySetUrl(issuer.url, timeout_s=0.1).read()


def test_an_issuer_that_is_away_is_told_without_its_address() -> None:
    """Nobody listens, and nobody has that name."""
    with key_server() as issuer:
        gone = issuer.url
    for url in (gone, "https://" + "x" * 70 + ".invalid/keys"):
        with pytest.raises(KeySetUnreadable) as caught:
            KeySetUrl(url).read()
        assert url.split("/")[2] not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example/keys",
        "http://10.0.0.1/keys",
        "http://127.0.0.1.example/keys",
        "ftp://127.0.0.1/keys",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@issuer.example/keys",
        "https://issuer.example:99999/keys",
        "https://issuer.example/a b",
        "https://issuer.example/a\r\nx: y",
    ],
)
def test_only_urls_that_can_be_trusted_are_taken(url: str) -> None:
    """Plain http reaches this machine alone; other schemes, users and blanks are mistakes."""
    with pytest.raises(ValueError, match=r"https|Port|without user"):
        source_of(url, http_allowed=False)


def test_http_to_others_can_be_allowed() -> None:
    """An operator may trust a network; loopback needs no permission."""
    for url, allowed in (
        ("http://issuer.example/keys", True),
        ("http://localhost:1/keys", False),
        ("http://[::1]:1/keys", False),
    ):
        assert isinstance(source_of(url, http_allowed=allowed), KeySetUrl)
    assert isinstance(source_of("keys/jwks.json", http_allowed=False), KeySetFile)


async def test_unknown_keys_cause_one_look_within_the_interval() -> None:
    """However many calls name however many unknown keys; a known one causes none."""
    source = FakeSource(key_set(FIRST), key_set(FIRST), key_set(FIRST, SECOND))
    following = Following(source)
    await following.follower.load()
    following.time_s = 9.0
    await following.follower.learn("invented")
    assert source.looks == 1
    following.time_s = 10.0
    await asyncio.gather(*(following.follower.learn(f"invented-{number}") for number in range(50)))
    assert source.looks == 2
    following.time_s = 30.0
    await following.follower.learn(FIRST_ID)
    assert source.looks == 2
    await following.follower.learn(SECOND_ID)
    assert (source.looks, following.known(FIRST_ID, SECOND_ID)) == (3, True)


async def test_who_hangs_up_keeps_nobody_from_what_was_read() -> None:
    """An anonymous call with an invented key that ends at once is no way to keep a withdrawn one in force."""
    source = SlowSource(key_set(FIRST), key_set(SECOND))
    following = Following(source)
    await following.follower.load()
    following.time_s = 10.0
    call = asyncio.create_task(following.follower.learn("invented"))
    await asyncio.to_thread(source.asked.wait, 5)
    call.cancel()
    await asyncio.wait({call})
    waiting = asyncio.create_task(following.follower.learn(SECOND_ID))
    await asyncio.sleep(0)
    source.answers_on.set()
    await waiting
    assert (following.known(SECOND_ID), following.known(FIRST_ID), source.looks) == (True, False, 2)


async def test_calls_do_not_put_off_the_periodic_look() -> None:
    """However lately somebody had one made."""
    source = FakeSource(key_set(FIRST), key_set(FIRST), key_set(SECOND))
    source.look_s = 0.01
    following = Following(source)
    await following.follower.load()
    following.time_s = 10.0
    await following.follower.learn("invented")
    running = asyncio.create_task(following.follower.run())
    async with asyncio.timeout(5):
        while not following.known(SECOND_ID):  # noqa: ASYNC110 - the keys tell nobody
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})


async def test_a_look_ends_with_the_process() -> None:
    """What a call began and left is nobody's any more."""
    source = SlowSource(key_set(FIRST), key_set(SECOND))
    following = Following(source)
    await following.follower.load()
    running = asyncio.create_task(following.follower.run())
    following.time_s = 10.0
    call = asyncio.create_task(following.follower.learn("invented"))
    await asyncio.to_thread(source.asked.wait, 5)
    running.cancel()
    await asyncio.wait({running, call}, timeout=5)
    source.answers_on.set()
    assert (running.cancelled(), call.cancelled()) == (True, True)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "key-look"]


async def test_a_set_that_was_refused_counts_as_failed_until_it_is_another() -> None:
    """It is looked for as soon as after any failure, and told each time."""
    with key_server(key_set(FIRST)) as issuer, capture_logs() as lines:
        following = Following(KeySetUrl(issuer.url))
        await following.follower.load()
        issuer.document = b"<html>"
        for time_s in (10.0, 20.0):
            following.time_s = time_s
            await following.follower.learn("new")
    assert [line["event"] for line in lines] == ["keys.read", "keys.unread", "keys.unread"]
    assert following.known(FIRST_ID)


@pytest.mark.parametrize("failure", [KeySetUnreadable("gone"), b"<html>", b'{"keys": 7}'], ids=str)
async def test_keys_outlive_a_source_that_fails(failure: bytes | Exception) -> None:
    """What is known stays in force while the source is away or talks nonsense; then it is followed again."""
    following = Following(FakeSource(key_set(FIRST), failure, key_set(SECOND)))
    await following.follower.load()
    following.time_s = 10.0
    await following.follower.learn("new")
    assert following.known(FIRST_ID)
    following.time_s = 20.0
    await following.follower.learn("new")
    assert following.known(SECOND_ID)


async def test_withdrawn_keys_are_not_believed() -> None:
    """A set without a usable key is the issuer's word as well."""
    following = Following(FakeSource(key_set(FIRST), key_set()))
    await following.follower.load()
    following.time_s = 10.0
    await following.follower.learn("other")
    assert not following.known(FIRST_ID)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (key_set(), KeySetInvalid),
        (key_set(signing_key("ES256")), KeySetInvalid),
        (b"nonsense", KeySetInvalid),
        (KeySetUnreadable("gone"), KeySetUnreadable),
    ],
    ids=range(4),
)
async def test_a_start_without_keys_is_noticed(answer: bytes | Exception, error: type[Exception]) -> None:
    """The first look says why there is nothing to judge tokens by."""
    with pytest.raises(error):
        await Following(FakeSource(answer)).follower.load()


@pytest.mark.parametrize(
    ("answers", "look_s"),
    [((key_set(FIRST), key_set(SECOND)), 0.001), ((KeySetUnreadable("gone"), key_set(SECOND)), 3_600.0)],
    ids=["a change", "a source that failed is asked sooner"],
)
async def test_the_source_is_followed_without_any_call(
    answers: tuple[bytes | Exception, ...], look_s: float
) -> None:
    """Keys change by themselves."""
    source = FakeSource(*answers)
    source.look_s, source.look_min_s = look_s, 0.001
    keys = WatchedKeys("EdDSA", SECOND_ID)
    follower = KeyFollower(source, keys, time.monotonic)
    with contextlib.suppress(KeySetUnreadable):
        await follower.load()
    running = asyncio.create_task(follower.run())
    async with asyncio.timeout(5):
        await keys.seen.wait()
    running.cancel()
    await asyncio.wait({running})
