"""Refusals of a crowded queue. Owns: when what was refused just now need not be asked again.

A queue that is asked ten times as often as it serves says no nine times of ten. Each no costs the store and
the gateway as much as a yes, and that time is missing where tokens are made. So in a flood a refusal stands
for a moment, for requests of the same tenant that are like the one that was refused and take no less. It is
told before their prompts are tokenized, which is most of the work of a no; so a prompt is as long as its text
here. Must not know: clocks, or where the queue is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

from services.common.errors import QueueFull
from services.gateway.core.jobs import Band
from services.gateway.core.rolling_window import RollingWindow
from services.gateway.core.tenancy import TenantLimits

# A queue that serves fifty requests a second has moved by two or three in this time.
STANDS_S = 0.05
# So many refusals of one tenant in a second are a flood; below, every request is put to the queue.
FLOOD = 32
FLOOD_WINDOW_S = 1.0
FLOOD_BUCKETS = 10
# Clients that give the same deadline differ by their way here: by so much, or this part of it.
ALIKE_S = 0.1
ALIKE_PART = 0.1
# Texts of the same number of tokens differ in length by so much, or a little less.
LENGTH_PART = 0.25
# Tokens that a chat template may add to a prompt: roles, separators, what it says of the day.
TEMPLATE_TOKENS = 256
# Those beyond are put to the queue each time.
KEPT_MAX = 1_024

Key = tuple[str, str, Band, int, bool, TenantLimits]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What is known of a request before its prompt is tokenized.

    Attributes:
        model: The model's name.
        tenant: The subject that asks.
        band: How urgent it is.
        slots: Sequences.
        limits: What the tenant may take.
        timeout_s: Time until its deadline, when it came.
        deadline_s: Its deadline, on the clock of the caller.
        max_tokens: Most tokens of each sequence.
        prompt_size: Bytes of the prompt's text, or token ids where it was given by them.
        in_tokens: Whether it was given by token ids.
    """

    model: str
    tenant: str
    band: Band
    slots: int
    limits: TenantLimits
    timeout_s: float
    deadline_s: float
    max_tokens: int
    prompt_size: int
    in_tokens: bool = False

    @property
    def kind(self) -> Key:
        """What requests must have in common for one to stand for another."""
        return self.model, self.tenant, self.band, self.slots, self.in_tokens, self.limits

    @property
    def may_exceed_quota(self) -> bool:
        """Whether it could be more than a minute's tokens; a text has at most as many tokens as bytes."""
        quota = self.limits.tokens_per_minute
        most = self.prompt_size + TEMPLATE_TOKENS + self.slots * self.max_tokens
        return bool(quota and most > quota)

    def takes_no_less_than(self, other: Outline) -> bool:
        """Whether it is as much work as `other`, as far as can be said."""
        least = other.prompt_size if self.in_tokens else other.prompt_size * (1 - LENGTH_PART)
        return self.max_tokens >= other.max_tokens and self.prompt_size >= least


@dataclass(slots=True)
class _Refused:
    """What is remembered of requests of one kind: the latest refusal, and how many there were lately."""

    error: QueueFull
    outline: Outline
    at_s: float
    window: RollingWindow

    def tally(self, now_s: float) -> None:
        """Counts one more."""
        self.window = self.window.counted(now_s, failed=True)

    def stands(self, outline: Outline, now_s: float) -> bool:
        """Whether a request would be refused in the same words: it has as much time, and takes no less."""
        if self.window.tally(now_s).failures < FLOOD or now_s - self.at_s >= STANDS_S:
            return False
        alike_s = min(ALIKE_S, ALIKE_PART * self.outline.timeout_s)
        if abs(outline.timeout_s - self.outline.timeout_s) > alike_s:
            return False
        return outline.takes_no_less_than(self.outline)


class Refusals:
    """What the queue refused lately, by tenant, model, band, slots and limits."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, _Refused] = OrderedDict()

    def note(self, outline: Outline, error: QueueFull, now_s: float) -> None:
        """The queue refused a request."""
        if not error.lasting:
            return
        # The error itself was raised: it holds all that was under way then, prompts too.
        error = copy.copy(error)
        kind = outline.kind
        if (refused := self._kept.get(kind)) is None:
            window = RollingWindow(FLOOD_WINDOW_S, FLOOD_BUCKETS)
            refused = self._kept[kind] = _Refused(error, outline, now_s, window)
        refused.error, refused.outline, refused.at_s = error, outline, now_s
        refused.tally(now_s)
        self._kept.move_to_end(kind)
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def recall(self, outline: Outline, now_s: float) -> QueueFull | None:
        """The refusal that stands for a request; None: it is put to the queue."""
        refused = self._kept.get(outline.kind)
        if refused is None or not refused.stands(outline, now_s) or outline.may_exceed_quota:
            # What no minute could hold is told so.
            return None
        refused.tally(now_s)
        # Its own, for whoever raises it.
        return copy.copy(refused.error)
