"""The fixtures of the end-to-end tests; see `tests/fixtures/mesh.py`."""

from __future__ import annotations

from tests.fixtures.mesh import mesh, model_path

__all__ = ["mesh", "model_path"]
