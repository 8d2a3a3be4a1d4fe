"""Sources of key sets that answer what a test says, when it says so, and who follows them."""

from __future__ import annotations

import threading

from services.common.jwks import KeyFollower, KeySource
from services.common.token_keys import PublishedKeys

# Longer than any test waits for what it expects.
_HANGS_S = 20.0


class FakeSource:
    """A source that answers from a list; counts the looks.

    Attributes:
        answers: What `read` does, one after another; the last one again and again.
        looks: How often it was asked.
    """

    def __init__(self, *answers: bytes | Exception) -> None:
        self.look_s, self.look_min_s = 300.0, 10.0
        self.answers = list(answers)
        self.looks = 0

    def read(self) -> bytes:
        """See `KeySource.read`."""
        self.looks += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class SlowSource(FakeSource):
    """A source whose second answer comes when a test says so.

    Attributes:
        asked: Whether it was asked for that.
        answers_on: What it waits for.
        is_left_behind: Whether the thread that asked ends with the process.
    """

    def __init__(self, *answers: bytes | Exception) -> None:
        super().__init__(*answers)
        self.asked, self.answers_on = threading.Event(), threading.Event()
        self.is_left_behind = False

    def read(self) -> bytes:
        """See `KeySource.read`."""
        answer = super().read()
        if self.looks == 2:
            self.is_left_behind = threading.current_thread().daemon
            self.asked.set()
            assert self.answers_on.wait(_HANGS_S)
        return answer


class Following:
    """A follower with a clock that a test moves."""

    def __init__(self, source: KeySource) -> None:
        self.keys = PublishedKeys("EdDSA")
        self.time_s = 0.0
        self.follower = KeyFollower(source, self.keys, lambda: self.time_s)

    def known(self, *key_ids: str) -> bool:
        """Whether each of these keys is believed."""
        return all(self.keys.knows(key_id) for key_id in key_ids)
