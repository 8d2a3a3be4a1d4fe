"""A store of fsspec that fails on cue: `faulty://`, in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

PROTOCOL = "faulty"


@dataclass
class Faults:
    """What goes wrong, and what was called.

    Attributes:
        calls: Each call that came from outside, and its object.
        fail: Is told of each call before it happens, and may raise, or wait.
        changed: What is read, by the end of the object's name, instead of what is there.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    fail: Callable[[str, str], None] = lambda call, name: None  # noqa: ARG005 - nothing goes wrong
    changed: dict[str, bytes] = field(default_factory=dict)

    def made(self, *kinds: str) -> list[tuple[str, str]]:
        """The calls of these kinds."""
        return [one for one in self.calls if one[0] in kinds]


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system in memory, whose calls are told to `faults` first."""

    protocol = PROTOCOL
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[Faults] = Faults()
    _inside: ClassVar[threading.local] = threading.local()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix(f"{PROTOCOL}:/")))

    def _told(self, call: str, path: str, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "told", False):
            return getattr(super(), call)(path, *args, **kwargs)
        self.faults.calls.append((call, path))
        self.faults.fail(call, path)
        self._inside.told = True
        try:
            return getattr(super(), call)(path, *args, **kwargs)
        finally:
            self._inside.told = False

    def ls(self, path: str, **kwargs: Any) -> Any:
        """See fsspec."""
        return self._told("ls", path, **kwargs)

    def find(self, path: str, **kwargs: Any) -> Any:
        """See fsspec."""
        return self._told("find", path, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        """See fsspec."""
        return self._told("info", path, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """See fsspec."""
        data: bytes = self._told("cat_file", path, start=start, end=end, **kwargs)
        for name, content in self.faults.changed.items():
            if path.endswith(name):
                return content[start:end]
        return data

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        """See fsspec."""
        self.faults.calls.append(("put_file", rpath))
        self.faults.fail("put_file", rpath)
        self._inside.told = True
        try:
            super().put_file(lpath, rpath, **kwargs)
        finally:
            self._inside.told = False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        """See fsspec."""
        return self._told("pipe_file", path, value, mode=mode, **kwargs)

    def rm_file(self, path: str) -> None:
        """See fsspec."""
        self._told("rm_file", path)


def begin() -> Faults:
    """An empty store without faults."""
    fsspec.register_implementation(PROTOCOL, FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    FaultyFileSystem.faults = Faults()
    return FaultyFileSystem.faults


def objects() -> dict[str, bytes]:
    """Everything in the store."""
    return {name: bytes(file.getvalue()) for name, file in FaultyFileSystem.store.items()}
