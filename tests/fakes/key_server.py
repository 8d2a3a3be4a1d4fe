"""An issuer that publishes its keys over HTTP, and fails on cue."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class KeyServer:
    """What the issuer answers.

    Attributes:
        document: The body.
        status: The status; with 302 it points elsewhere on the same server.
        trickle_s: Seconds between two bytes of the body; 0: all at once.
        requests: The paths that were asked for.
    """

    document: bytes = b""
    status: int = 200
    trickle_s: float = 0.0
    requests: list[str] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        """Where the keys are."""
        return f"{self.scheme}://127.0.0.1:{self.port}/keys?v=1"


@contextmanager
def key_server(document: bytes = b"", tls: ssl.SSLContext | None = None) -> Iterator[KeyServer]:
    """A server on a free port, in a thread; with `tls` over https."""
    told = KeyServer(document, scheme="http" if tls is None else "https")

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Says nothing of callers that hang up, such as one that does not trust the certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.requests.append(self.path)
            self.send_response(told.status)
            self.send_header("content-length", str(len(told.document)))
            if told.status == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()
            step = 1 if told.trickle_s else max(1, len(told.document))
            try:
                for start in range(0, len(told.document), step):
                    self.wfile.write(told.document[start : start + step])
                    time.sleep(told.trickle_s)
            except OSError:
                # The reader has seen enough.
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = False
    told.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
