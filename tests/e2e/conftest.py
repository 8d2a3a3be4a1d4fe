"""The fixtures of the end-to-end tests; see `tests/fixtures/mesh.py` and `javascript.py`."""

from __future__ import annotations

import signal

from tests.fixtures.javascript import chromium, node
from tests.fixtures.mesh import mesh, model_path

__all__ = ["chromium", "mesh", "model_path", "node"]

# A shell without job control lets what it starts in the background ignore Ctrl-C, and so would all that these
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
