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
    """Of rollouts in order those under way, and of the completed ones the last from each revision.

    They tell which revision serves, by that of the start, and which ones have served before.
    """
    completed = [record for record in found if record.state is State.COMPLETED]
    serving = {record.origin: record.id for record in completed}
    served = {record.previous: record.id for record in completed}
    return {record.id for record in found if not record.ended} | {*serving.values(), *served.values()}
