"""A worker's signs of life. Owns: when one that has work counts as hung.

Pure: times are arguments, in seconds of a clock that never goes back. Two things are a hang: silence, and
signs of life that never tell of a further step although jobs could make one. A job that waits for its client
makes none. Nor is anything a hang that this process could not hear because it stood still itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.common.standstill import stood_still

# If nobody looked for so long, the worker may have ended the session meanwhile; sooner no worker does.
ABSENCE_S = 3.0
# For so long after that the end of a session may be news of then.
NEWS_S = 3.0


@dataclass(slots=True)
class VitalSigns:
    """What was last heard of one worker.

    Attributes:
        silence_s: How long it may say nothing.
        stall_s: How long its steps may stand still.
        heard_s: When it last said anything.
        moved_s: When it last made progress, or had none to make.
        step: The last step that it told of.
        looked_s: When somebody last looked.
        woke_s: When this process last went on after it had been absent.
    """

    silence_s: float
    stall_s: float
    heard_s: float = 0.0
    moved_s: float = 0.0
    step: int = -1
    looked_s: float = math.inf
    woke_s: float = -math.inf

    def look(self, now_s: float) -> None:
        """Somebody looks, as he does several times a second; what was missed meanwhile is not judged."""
        if stood_still(self.looked_s, now_s):
            # The worker may have spoken all the while.
            self.reset(now_s)
        if now_s - self.looked_s > ABSENCE_S:
            self.woke_s = now_s
        self.looked_s = now_s

    def was_absent(self, now_s: float) -> bool:
        """Whether this process stood still until a moment ago, for so long that its session may be over."""
        return now_s - self.looked_s > ABSENCE_S or now_s - self.woke_s < NEWS_S

    def reset(self, now_s: float) -> None:
        """Begins anew: nothing was expected of it before."""
        self.heard_s = self.moved_s = now_s

    def hear(self, now_s: float) -> None:
        """It did something for a job."""
        self.heard_s = self.moved_s = now_s

    def hear_alive(self, step: int, *, can_step: bool, now_s: float) -> None:
        """It told how many steps it has made; `can_step`: whether a job of ours does not wait for credit."""
        self.heard_s = now_s
        if step != self.step or not can_step:
            self.moved_s = now_s
        self.step = step

    def ailment(self, now_s: float) -> str | None:
        """What is wrong with a worker that has work; None: nothing."""
        if now_s - self.heard_s > self.silence_s:
            return f"it said nothing for {self.silence_s:g} s"
        if now_s - self.moved_s > self.stall_s:
            return f"it made no step for {self.stall_s:g} s"
        return None
