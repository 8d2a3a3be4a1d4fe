"""What several of the controller's tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.machines import faults, machines
from tests.fixtures.upload_world import Place

__all__ = ["faults", "machines", "place"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A controller's directory without uploads."""
    return Place(tmp_path)
