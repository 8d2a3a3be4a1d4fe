"""What goes wrong at a start is told with its reason: a store that is away, a revision that failed."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from services.cli import status
from services.local import redis_server, revision_log, store_probe
from services.local.log_file import LogFile, size_bytes, tail


@pytest.mark.parametrize("form", ["redis://user:word@{}/0", "rediss://{}", "redis+cluster://127.0.0.1:1,{}"])
async def test_a_store_that_listens_is_found(form: str) -> None:
    """By host and port of every kind of URL; when it is gone, that is found as well."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    url = form.format(f"{host}:{port}")
    async with server:
        assert await store_probe.listens(url)
    assert not await store_probe.listens(url)


@pytest.mark.parametrize("name", ["plain", "C# b?%41"])
async def test_a_store_on_a_socket_is_found(tmp_path: Path, name: str) -> None:
    """A `unix://` URL names a path, in which what a URL would read otherwise is escaped."""
    directory = tmp_path / name
    directory.mkdir()
    url = redis_server.url(directory / "redis.sock")
    assert not await store_probe.listens(url)
    assert not status._listens(url)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "redis.sock"))
        server.listen(2)
        assert await store_probe.listens(url)
        assert status._listens(url)


def test_a_failed_revision_is_found_in_the_log_of_this_run(tmp_path: Path) -> None:
    """Its member and reason count; another member's, and an earlier run's, do not."""
    log = tmp_path / "controller-1.log"
    line = {"event": "revision.failed", "gateway_id": "gateway-1", "reason": "no chat template"}
    log.write_text(json.dumps(line) + "\nno json: revision.failed\n")
    assert revision_log.failure(log, 0, "gateway-1") == "no chat template"
    assert revision_log.failure(log, 0, "gateway-10") is None
    assert revision_log.failure(log, size_bytes(log), "gateway-1") is None
    assert revision_log.failure(tmp_path / "absent.log", 0, "gateway-1") is None


def test_how_far_a_model_is_read_is_found_in_the_log_of_this_run(tmp_path: Path) -> None:
    """The last word counts, and none of an earlier run."""
    log = tmp_path / "controller-1.log"
    lines = [{"event": "hashing.advanced", "read_bytes": read, "size_bytes": 9} for read in (3, 6)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "rpc.finished"}\n')
    assert revision_log.model_read(log, 0) == (6, 9)
    assert revision_log.model_read(log, size_bytes(log)) is None


def test_the_tail_leaves_out_an_earlier_run(tmp_path: Path) -> None:
    """Only what was written since counts; a log that was begun anew counts whole."""
    log = tmp_path / "part.log"
    log.write_text("old\n")
    start = size_bytes(log)
    with log.open("a") as file:
        file.write("new\n")
    assert tail(log, from_byte=start) == "new"
    log.write_text("n\n")
    assert tail(log, from_byte=start) == "n"


def test_a_full_disk_does_not_end_the_watch(tmp_path: Path) -> None:
    """A write that the disk refuses is lost without an error."""
    path = tmp_path / "part.log"
    path.symlink_to("/dev/full")
    log = LogFile(path)
    log.write(b"lost")
    log.close()


def test_a_log_that_was_moved_and_not_begun_anew_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a moment takes the lines of that moment, and not the log for ever."""
    path = tmp_path / "part.log"
    log = LogFile(path, bytes_max=10)
    log.write(b"1234567\n")
    opened, refusals = Path.open, iter([OSError(errno.ENOSPC, "No space left on device")])

    def refusing(file: Path, *arguments: Any, **options: Any) -> Any:
        for refusal in refusals:
            raise refusal
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    log.write(b"lost\n")
    log.write(b"kept\n")
    log.close()
    assert tail(path) == "kept"
    assert tail(path.with_name("part.log.1")) == "1234567"
