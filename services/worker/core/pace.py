"""The pace of prefill. Owns: how many prompt tokens a step takes in, by what earlier steps took. Pure.

Streams wait for the prefill that shares a step with them. How long it takes depends on the machine, the
model and the tokens before, and a short chunk costs far more than its share of a long one. So nothing is
assumed: a chunk that took too long makes the next one shorter, and one that was quick makes it longer. What
a step takes without a chunk depends on how many streams decode in it, so it is known by their number; where
it is not known, and now and then, a step goes without.
"""

from __future__ import annotations

# A step with prefill should take this many times as long as one without. Steps vary, so it is below the
# three times that streams may come to feel at their slowest twentieth.
STALL_RATIO = 2.4

# A step of prefill alone takes about this long at most: commands wait for it, and gateways take a worker that
# makes none for some seconds for one that hangs.
PREFILL_STEP_S_MAX = 0.5

# The first chunk in which nothing decodes: as long as nothing is known of a model, a step that took in all
# that it may take could last for as long as a hang.
TOKENS_FIRST = 64

# Chunks never get shorter than this; below it, reading the weights costs more than the tokens.
CHUNK_TOKENS_MIN = 16

# The first chunk that streams wait for: as long as nothing is known of a model, a part is enough, for a
# hundred tokens of one that is not quantized take a large part of a second.
SHARED_TOKENS_FIRST = 16

# How fast chunks get longer again, for each step that was quicker than it had to be.
GROWTH_MAX = 1.25

# The same while nobody waits for them and a step takes less than the share of its time: twice the tokens may
# take more than twice as long, and still are far from too many. A quick machine is at its longest at once.
LEAP = 2.0
LEAP_SHARE = 0.25

# The weight of the newest decode: one step that the machine interrupted changes little.
_NEWEST = 0.25

# After so many steps with a chunk in a row one goes without: the machine may have become slower or faster.
LOOK_STEPS = 200


class PrefillPace:
    """Measures steps and tells the next chunk's length.

    Args:
        chunk_tokens: Most prompt tokens of a step in which nothing decodes.
        shared_chunk_tokens: Most prompt tokens of a step that also decodes.
    """

    def __init__(self, chunk_tokens: int, shared_chunk_tokens: int) -> None:
        self._alone = _Length(chunk_tokens, first=TOKENS_FIRST)
        self._shared = _Length(shared_chunk_tokens, first=SHARED_TOKENS_FIRST)
        # By the class of their number: what a step takes in which so many streams decode, and nothing else.
        self._decode_s: dict[int, float] = {}
        self._looked: set[int] = set()
        self._shared_steps = 0

    def budget(self, *, decodes: int, beside: bool = False) -> int:
        """Most prompt tokens of the next step, in which so many streams decode; asked once a step.

        `beside`: streams of another revision wait for it; what they take is not known here, and a chunk is no
        longer than one that shares its step.
        0: it shall go without, so that it tells what it takes. That is never said twice of one number: who
        does not note what steps take is not kept from his prompts.
        """
        if not decodes:
            return int(min(self._alone.tokens, self._shared.tokens) if beside else self._alone.tokens)
        if (kind := _class_of(decodes)) not in self._looked or self._shared_steps >= LOOK_STEPS:
            self._looked.add(kind)
            self._shared_steps = 0
            return 0
        return int(self._shared.tokens)

    def note(self, step_s: float, *, chunk_tokens: int, decodes: int) -> None:
        """Takes in how long a step took that did so much."""
        if not decodes:
            is_quick = step_s < LEAP_SHARE * PREFILL_STEP_S_MAX
            growth = LEAP if is_quick else GROWTH_MAX
            self._alone.adapt(chunk_tokens, step_s, PREFILL_STEP_S_MAX, growth)
            return
        kind = _class_of(decodes)
        self._looked.add(kind)
        if not chunk_tokens:
            known = self._decode_s.get(kind, step_s)
            self._decode_s[kind] = known + _NEWEST * (step_s - known)
            self._shared_steps = 0
        elif (decode_s := self._decode_s.get(kind)) is not None:
            self._shared.adapt(chunk_tokens, step_s - decode_s, (STALL_RATIO - 1) * decode_s)
            self._shared_steps += 1


def _class_of(decodes: int) -> int:
    """The class of a number of streams: 1, 2, 3, 4, 6, 8, 12, 16 and so on, whichever is next above."""
    power = 1 << (decodes - 1).bit_length()
    between = power * 3 // 4
    return between if decodes <= between else power


class _Length:
    """A length of chunks that follows what chunks take."""

    def __init__(self, most: int, *, first: int) -> None:
        self._most = most
        self._least = min(CHUNK_TOKENS_MIN, most)
        self.tokens = float(min(first, most))

    def adapt(self, chunk_tokens: int, took_s: float, allowed_s: float, growth: float = GROWTH_MAX) -> None:
        """Moves towards the length that takes as long as it may."""
        better = chunk_tokens * min(allowed_s / max(took_s, 1e-6), growth)
        # A prompt's end is shorter than it might be, and says nothing about longer chunks.
        if better < self.tokens and (took_s > allowed_s or chunk_tokens >= int(self.tokens)):
            self.tokens = max(self._least, better)
        elif better > self.tokens:
            self.tokens = min(self._most, better)
