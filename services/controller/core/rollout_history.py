"""The history of rollouts. Owns: which records are kept, of all that there were. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.controller.core.rollout_record import Rollout, State

# An operator wants to read what happened lately; older records only slow the start.
HISTORY_MAX = 200


def worth_keeping(found: Sequence[Rollout]) -> set[str]:
    """Of rollouts in order the latest, and what must not be forgotten."""
    return {record.id for record in found[-HISTORY_MAX:]} | needed(found)


def needed(found: Sequence[Rollout]) -> set[str]:
    """Of rollouts in order those under way, and the last that was completed from each revision of a start."""
    serving = {record.origin: record.id for record in found if record.state is State.COMPLETED}
    return {record.id for record in found if not record.ended} | set(serving.values())
