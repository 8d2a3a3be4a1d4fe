"""The door of a mesh. Owns: where and as whom commands call, and how the environment names one elsewhere."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from services.cli.failure import CommandFailed

Metadata = tuple[tuple[str, str], ...]

URL, TOKEN, CA_FILE = "INTERLOCK_URL", "INTERLOCK_TOKEN", "INTERLOCK_CA_FILE"

# No user, path or query: nothing of them would be sent, and a password would seem to be of use.
_URL = re.compile(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/?")
_PORTS = {"http": 80, "https": 443}
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Door:
    """What a command needs to call a mesh.

    Attributes:
        address: Envoy's, as gRPC names targets.
        metadata: Lets a call pass.
        hint: Where to look when nobody answers.
        tls: Whom to believe to be the mesh; None: it speaks plain text.
    """

    address: str
    metadata: Metadata = field(repr=False)
    hint: str
    tls: grpc.ChannelCredentials | None = None


def bearer(token: str) -> Metadata:
    """What makes a call with a token."""
    return (("authorization", f"Bearer {token}"),)


def door_elsewhere(environ: Mapping[str, str]) -> Door | None:
    """The door that the environment names; None: it names none.

    Raises:
        CommandFailed: It names half of one, or none that there can be. No message repeats a value: a URL may
            hold a password.
    """
    url, token = environ.get(URL, ""), environ.get(TOKEN, "").strip()
    if not url and not token:
        return None
    if not url or not token:
        there, lacks = (URL, TOKEN) if url else (TOKEN, URL)
        raise CommandFailed(
            f"{there} is set and {lacks} is not. Both name a mesh elsewhere; without both it is the home's."
        )
    found = _URL.fullmatch(url)
    if found is None or not 1 <= int(found[3] or _PORTS[found[1]]) <= _PORT_MAX:
        raise CommandFailed(
            f"{URL} is no URL of a mesh. It is http or https, a host and perhaps a port, such as "
            "https://mesh.example:8443."
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise CommandFailed(f"{TOKEN} is no token: it has a space or a letter that none has.")
    scheme, host, port = found.groups()
    return Door(
        # With its scheme: a host could have the name of another one, such as `unix`.
        address=f"dns:///{host}:{port or _PORTS[scheme]}",
        metadata=bearer(token),
        hint=f"{URL} says where it was looked for.",
        tls=_tls(environ.get(CA_FILE, "")) if scheme == "https" else None,
    )


def _tls(ca_file: str) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(_roots_of(ca_file) if ca_file else _roots_of_machine())


def _roots_of(ca_file: str) -> bytes:
    roots = Path(ca_file).read_bytes()
    try:
        # gRPC would take anything, and say only that nobody answers.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    except ssl.SSLError:
        raise CommandFailed(f"{CA_FILE}: {ca_file} holds no certificate in PEM.") from None
    return roots


def _roots_of_machine() -> bytes | None:
    """Whom the machine trusts, as OpenSSL finds it; None, where that is nobody: gRPC has its own list."""
    paths = ssl.get_default_verify_paths()
    files = [Path(paths.cafile)] if paths.cafile else []
    if paths.capath:
        # Certificates are named by a hash and a number there.
        files += sorted(Path(paths.capath).glob("*.[0-9]"))
    return b"\n".join(file.read_bytes() for file in files if file.is_file()) or None
