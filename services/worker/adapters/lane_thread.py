"""Threads beside another one. Owns: work that a thread gives to some of its own, and waits for.

They belong to the thread that gives, and end after it. They have its priority, and may run on any core that
the process may use, while OpenMP has bound that one to a single core. It would bind these to the same core as
soon as they shared work with others; so whatever a library does in them, it does alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_of_thread = threading.local()


class Promise(Generic[T]):
    """What work returns that was given away."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._found: T | None = None
        self._error: BaseException | None = None

    def keep(self) -> None:
        """Does the work."""
        try:
            with torch.inference_mode():
                self._found = self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is fetched
            self._error = error
        finally:
            del self._work
            self._done.set()

    def wait(self) -> None:
        """Returns when the work has ended, however it did."""
        self._done.wait()

    def fetch(self) -> T:
        """Waits for the result.

        Raises:
            BaseException: What the work raised.
        """
        self.wait()
        # Kept, it would hold all that its frames hold, and these the promise: nobody would be rid of either.
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
        return self._found  # type: ignore[return-value] # without an error it is what the work returned


class _Companion:
    """A thread beside the one that makes it."""

    def __init__(self) -> None:
        self._line: queue.SimpleQueue[Promise[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_attend, args=(self._line,), name="lane", daemon=True).start()

    def give(self, promise: Promise[Any]) -> None:
        self._line.put(promise)

    def __del__(self) -> None:
        # The thread that it belongs to has ended.
        self._line.put(None)


def beside(lane: int, work: Callable[[], T]) -> Promise[T]:
    """Begins work in one of the calling thread's own, behind what that one was given before.

    Args:
        lane: Which of them, counted from 0.
        work: What is done there.
    """
    companions: dict[int, _Companion] = _of_thread.__dict__.setdefault("companions", {})
    if (companion := companions.get(lane)) is None:
        companion = companions[lane] = _Companion()
    promise = Promise(work)
    companion.give(promise)
    return promise


def _attend(line: queue.SimpleQueue[Promise[Any] | None]) -> None:
    _work_alone()
    if cores := bound_cores():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    while (promise := line.get()) is not None:
        promise.keep()
        # A result may be large, and is nobody's business until the next one comes.
        del promise


def _work_alone() -> None:
    """Lets no library share this thread's work with others.

    Torch's own function for that would also set what threads of later find.
    """
    # What torch finds at a thread's first question would overwrite it.
    torch.get_num_threads()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).omp_set_num_threads(1)


def bound_cores() -> set[int]:
    """The cores that OpenMP binds its threads to; empty: it binds none, or is not there."""
    library = ctypes.CDLL(None)
    try:
        places = library.omp_get_num_places()
    except AttributeError:
        return set()
    cores: set[int] = set()
    for place in range(places):
        ids = (ctypes.c_int * library.omp_get_place_num_procs(place))()
        library.omp_get_place_proc_ids(place, ids)
        cores.update(ids)
    return cores
