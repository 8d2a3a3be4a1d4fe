"""The fixtures of the end-to-end tests; see `tests/fixtures/mesh.py` and `javascript.py`."""

from __future__ import annotations

from tests.fixtures.javascript import chromium, node
from tests.fixtures.mesh import mesh, model_path

__all__ = ["chromium", "mesh", "model_path", "node"]
