"""Threads beside another one. Owns: work that a thread gives to some of its own, and waits for.

They belong to the thread that gives, and end after it. They have its priority, and may run on any core that
the process may use, while a library may have bound that one to a single core.
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
        if self._error is not None:
            raise self._error
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
    if cores := bound_cores():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    while (promise := line.get()) is not None:
        promise.keep()
        # A result may be large, and is nobody's business until the next one comes.
        del promise


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
