"""What goes wrong at a start is told with its reason: a store that is away, a revision that failed."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from services.local import revision_log, store_probe
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


async def test_a_store_on_a_socket_is_found(tmp_path: Path) -> None:
    """A `unix://` URL names a path, with a query or without."""
    url = f"unix://{tmp_path}/redis.sock?db=0"
    assert not await store_probe.listens(url)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "redis.sock"))
        server.listen(1)
        assert await store_probe.listens(url)


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
