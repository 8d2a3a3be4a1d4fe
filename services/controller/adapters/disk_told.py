"""A full disk. Owns: what is said of one to whoever can do something about it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from services.common import logs
from services.common.errors import QuotaExceeded


@contextlib.contextmanager
def disk_told() -> Iterator[None]:
    """Says of a full disk what to do about it.

    Raises:
        QuotaExceeded: It is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        logs.get_logger().error("upload.disk_full", error=error.strerror)
        raise QuotaExceeded(
            "The controller's disk is full; what came so far is kept."
            " Make room or delete a revision, plan again and go on."
        ) from None
