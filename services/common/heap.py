"""The heap. Owns: what the garbage collector leaves alone in a process that serves.

Imports leave tens of thousands of objects that live as long as the process, a worker's hundreds of thousands;
each full collection walks over all of them and lets nothing else run meanwhile: 30 to 120 ms on a slow core,
in the middle of somebody's stream.
"""

from __future__ import annotations

import gc

# Allocations between two looks at the youngest objects. A request makes some hundreds, hardly one in a cycle.
YOUNG_MAX = 10_000


def settle() -> None:
    """Exempts what lives now from all later collections; called once, when a process is composed.

    Objects are still freed when nobody refers to them; only cycles among what lives now never are.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, *gc.get_threshold()[1:])
