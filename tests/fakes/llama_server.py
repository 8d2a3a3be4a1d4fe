"""A program that speaks as llama.cpp's server does, so far as a bench listens; it counts upwards.

Run as `python llama_server.py --port N ...`; every other option is ignored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers `/health` and `/completion`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """It is healthy."""
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        """Streams the tokens that follow the prompt's last one, the first two at once."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["n_predict"] > 1_000:
            self.send_error(400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in _events(request):
            # Two chunks for one event: a client must not take a chunk for an event.
            line = b"data: " + json.dumps(event).encode() + b"\n\n"
            for piece in (line[:9], line[9:]):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Says nothing."""


def _events(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    last = request["prompt"][-1]
    tokens = [last + 1 + place for place in range(request["n_predict"])]
    yield {"tokens": tokens[:2], "stop": False}
    for token in tokens[2:]:
        yield {"tokens": [token], "stop": False}
    yield {"tokens": [], "stop": True, "prompt": "x" * 100_000}


if __name__ == "__main__":
    place = sys.argv.index("--port") + 1
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[place])), Handler).serve_forever()
