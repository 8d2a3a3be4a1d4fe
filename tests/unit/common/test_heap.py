"""What the collector leaves alone: in a process of its own, as it holds for the whole of one."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from services.common import heap

class Node:
    pass

old = Node()
heap.settle()
assert gc.get_freeze_count() > 1_000
seen = weakref.ref(old)
del old
assert seen() is None, "freed as soon as nobody refers to it"
one, other = Node(), Node()
one.other, other.other = other, one
gone = weakref.ref(one)
del one, other
gc.collect()
assert gone() is None, "a cycle of later is collected"
assert gc.get_threshold()[0] == heap.YOUNG_MAX
"""


def test_what_lives_at_the_start_is_left_alone() -> None:
    """It is walked over no more; what comes later is collected as ever."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=30)
