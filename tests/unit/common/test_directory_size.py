"""The size of a directory while another process works in it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from services.common.directory_size import bytes_below

# A walk that raises where a directory vanishes does so about once in five.
WALKS = 500


def test_files_at_any_depth_count_and_links_do_not_lead_out(tmp_path: Path) -> None:
    """Two files count; a link counts as itself, not as what it names."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "a" / "b" / "two").write_bytes(b"22")
    assert bytes_below(tmp_path) == 3
    (tmp_path / "link").symlink_to("one")
    assert bytes_below(tmp_path) == 3 + len("one")
    assert bytes_below(tmp_path / "absent") == 0


def test_directories_that_vanish_under_a_look_are_no_error(tmp_path: Path) -> None:
    """pip makes and removes directories while its download is measured: no walk may fail for it."""
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True)
            (tmp_path / "a" / "b" / "file").write_bytes(b"1")
            shutil.rmtree(tmp_path / "a")

    worker = threading.Thread(target=come_and_go)
    worker.start()
    try:
        seen = {bytes_below(tmp_path) for _ in range(WALKS)}
    finally:
        over.set()
        worker.join()
    assert seen <= {0, 1}
