"""Whether this process itself stood still. Owns: from when on a late look means that; pure.

A machine that was suspended, a process that was stopped and one that got no core miss what others did
meanwhile: whoever judges others by what they did not do leaves that time out.
"""

from __future__ import annotations

OWN_PAUSE_S = 1.0


def stood_still(due_s: float, now_s: float) -> bool:
    """Whether a look that was due at `due_s` comes so late that nothing ran here in between.

    Both in seconds of one clock that never goes back.
    """
    return now_s - due_s > OWN_PAUSE_S
