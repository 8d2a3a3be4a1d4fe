"""When a worker that has work counts as hung."""

from __future__ import annotations

import pytest

from services.gateway.core.vital_signs import VitalSigns


@pytest.fixture
def signs() -> VitalSigns:
    """A worker that got its first job at second 100."""
    found = VitalSigns(silence_s=2.0, stall_s=5.0)
    found.reset(100.0)
    return found


def test_silence_is_a_hang(signs: VitalSigns) -> None:
    """Two seconds are forgiven, more are not."""
    assert signs.ailment(102.0) is None
    assert "nothing" in (signs.ailment(102.1) or "")


def test_alive_without_a_step_is_a_hang(signs: VitalSigns) -> None:
    """It says every second that it lives, and never gets on with the one job that could."""
    for second in range(101, 108):
        signs.hear_alive(7, can_step=True, now_s=second)
    assert signs.ailment(106.0) is None
    assert "no step" in (signs.ailment(106.1) or "")


def test_a_long_prefill_is_none(signs: VitalSigns) -> None:
    """No token comes for a minute, but each sign of life tells of further steps."""
    for second in range(101, 160):
        signs.hear_alive(second, can_step=True, now_s=second)
        assert signs.ailment(second + 0.9) is None


def test_a_job_that_waits_for_its_client_is_none(signs: VitalSigns) -> None:
    """All jobs are paused for want of credit: the step may stand still for as long as they are."""
    for second in range(101, 160):
        signs.hear_alive(7, can_step=False, now_s=second)
        assert signs.ailment(second + 0.9) is None
    signs.hear_alive(7, can_step=True, now_s=160)
    assert signs.ailment(160.0) is None


def test_tokens_are_steps(signs: VitalSigns) -> None:
    """What it does for a job is a sign of life and of progress."""
    for second in range(101, 160):
        signs.hear(second)
        assert signs.ailment(second + 1.9) is None
