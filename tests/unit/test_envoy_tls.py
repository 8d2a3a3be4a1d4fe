"""TLS at the edge: what clients must speak, and certificates that are renewed under running streams."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from deploy.envoy import generate
from deploy.envoy.parameters import Certificate, Endpoint, Parameters
from tests.fixtures.certificates import certify
from tests.fixtures.edge import Edge, call, started_edge

GENERATE = "/interlock.v1.GatewayService/Generate"


@dataclass(frozen=True, slots=True)
class TlsEdge:
    """An Envoy that serves TLS, and the directory that its certificate is read from."""

    edge: Edge
    directory: Path

    def handshake(self, context: ssl.SSLContext) -> tuple[str | None, str | None, bytes]:
        """Connects: the version, the protocol that ALPN chose, and the certificate that was shown."""
        host, _, port = self.edge.address.partition(":")
        connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
        try:
            connection.connect()
            sock = connection.sock
            assert isinstance(sock, ssl.SSLSocket)
            shown = ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True) or b"").encode()
            return sock.version(), sock.selected_alpn_protocol(), shown
        finally:
            connection.close()


def _context(*, at_most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that believes anything, as an attacker may, up to a version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = at_most
    return context


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsEdge]:
    """The TLS variant's configuration with a certificate that was made just now."""
    run = tmp_path_factory.mktemp("tls")
    directory = run / "certificate"
    directory.mkdir()
    certify(directory, "first")
    parameters = Parameters(
        admin=run / "admin.sock", certificate=Certificate(str(run / "secret.yaml"), str(directory))
    )
    text = generate.render_secret(parameters)
    assert text is not None
    (run / "secret.yaml").write_text(text)
    with started_edge(run, parameters) as edge:
        yield TlsEdge(edge, directory)


def test_what_is_older_than_tls_1_2_is_refused(tls: TlsEdge) -> None:
    """1.2 and 1.3 are spoken, 1.1 and weak ciphers of 1.2 are not."""
    assert tls.handshake(_context())[0] == "TLSv1.3"
    assert tls.handshake(_context(at_most=ssl.TLSVersion.TLSv1_2))[0] == "TLSv1.2"
    weak = _context(at_most=ssl.TLSVersion.TLSv1_2)
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        tls.handshake(weak)
    old = _context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        tls.handshake(old)


def test_alpn_offers_both_versions_of_http(tls: TlsEdge) -> None:
    """HTTP/2 is preferred; a client of HTTP/1.1 is served on the same port."""
    assert tls.handshake(_context())[1] == "h2"
    plain = _context()
    plain.set_alpn_protocols(["http/1.1"])
    host, _, port = tls.edge.address.partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=plain)
    connection.request("POST", "/v1/generate", "x")
    assert connection.getresponse().read() == b"gateway 1"
    connection.close()


def test_a_renewed_certificate_is_shown_without_a_restart(tls: TlsEdge) -> None:
    """New connections see the new certificate; one that was open keeps going, and Envoy never restarts."""
    served = tls.handshake(_context())[2]
    credentials = grpc.ssl_channel_credentials(root_certificates=served)
    with grpc.secure_channel(tls.edge.address, credentials) as before:
        assert call(before, GENERATE, b"one") == b"one"
        renewed = certify(tls.directory, "second")
        deadline = time.monotonic() + 10
        while tls.handshake(_context())[2] != renewed:
            assert time.monotonic() < deadline, "the new certificate is not served"
            time.sleep(0.05)
        # The old channel trusts the old certificate alone: a new connection of it would fail.
        assert call(before, GENERATE, b"two") == b"two"
    fresh = grpc.ssl_channel_credentials(root_certificates=renewed)
    with grpc.secure_channel(tls.edge.address, fresh) as after:
        assert call(after, GENERATE, b"three") == b"three"
    assert tls.edge.process.poll() is None


def test_half_a_pair_leaves_the_old_one_in_force(tls: TlsEdge) -> None:
    """A key that does not fit its certificate, or nonsense, takes nothing away from those who connect."""
    shown = tls.handshake(_context())[2]
    temporary = tls.directory.parent / ".half"
    temporary.write_text("nonsense")
    temporary.replace(tls.directory / "tls.key")
    # Envoy sees the move within milliseconds; the next one is seen after it and proves that it was.
    assert tls.handshake(_context())[2] == shown
    renewed = certify(tls.directory, "third")
    deadline = time.monotonic() + 10
    while (found := tls.handshake(_context())[2]) != renewed:
        assert found == shown
        assert time.monotonic() < deadline, "a good pair after a bad one is not served"
        time.sleep(0.05)


def test_plain_text_is_not_answered(tls: TlsEdge) -> None:
    """A token sent without TLS gets no reply that could make somebody send it again."""
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        tls.edge.ask("POST", "/v1/generate", "x")


def test_a_tls_edge_needs_both_files() -> None:
    """The probe's and clients' address stay what they are; the secret names certificate and key."""
    parameters = Parameters(listen=Endpoint("127.0.0.1", 1), certificate=Certificate("/a.yaml", "/b"))
    text = generate.render_secret(parameters)
    assert text is not None
    assert "/b/tls.crt" in text
    assert "/b/tls.key" in text
    assert generate.render_secret(Parameters()) is None
