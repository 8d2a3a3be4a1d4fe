"""Directories that others write to. Owns: how many bytes lie in one while files come and go."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def bytes_below(directory: Path) -> int:
    """The sizes of all files in `directory` at any depth, as they are met; links are not followed.

    Never raises: what is gone before it is asked, a file or a whole directory, counts nothing.
    """
    size_bytes = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                size_bytes += Path(folder, name).lstat().st_size
    return size_bytes
