"""What holds of every test: Hypothesis asks what holds, and never how fast."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("interlock", deadline=None)
settings.load_profile("interlock")
