"""Tensors in a file. Owns: how they are written as safetensors one by one, and mapped without a copy.

A mapped tensor is the page cache itself: every process that maps the file shares it, and the kernel may
drop and read again what nobody uses. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Vector instructions read whole lines; the file's tensors begin at them as allocated ones do.
ALIGNMENT = 64

# The header is written last and has its place kept from the start. A tensor's entry takes some 120 bytes; the
# largest models have a few thousand tensors.
HEADER_BYTES = 1 << 20

# So much is made resident at a time: small enough that a progress bar moves and an abort is noticed.
PIECE_BYTES = 32 << 20

# Linux 5.14 and later: maps pages that are there, reads those that are not.
_MADV_POPULATE_READ = 22

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many; what it raises ends the work."""


def write(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes tensors as they come, one in memory at a time; the file is on the disk afterwards.

    Raises:
        OSError: The disk is full, or not to be written to.
    """
    header: dict[str, Any] = {}
    with path.open("wb") as stream:
        stream.seek(HEADER_BYTES)
        position = 0
        for name, tensor in tensors:
            stream.write(_bytes_of(tensor))
            header[name] = _entry(tensor, position)
            position += tensor.nbytes
            if gap := -position % ALIGNMENT:
                # The format allows no gaps, so what fills them has a name.
                stream.write(bytes(gap))
                filling = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
                header[f"filling.{len(header)}"] = filling
                position += gap
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > HEADER_BYTES - 8:
            raise ValueError("So many tensors do not fit the header's place.")
        stream.seek(0)
        stream.write((HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8))
        stream.flush()
        # Pages that are written are clean: they count as shared, and can be dropped.
        os.fsync(stream.fileno())


def read(path: Path, progress: Progress) -> dict[str, torch.Tensor]:
    """Maps a file whose header has been checked; returns its tensors by name.

    They must not be written to: the mapping is private, and what is written is a copy from then on.
    """
    with path.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    _populate(pages, progress)
    length = int.from_bytes(pages[:8], "little")
    header: dict[str, Any] = json.loads(pages[8 : 8 + length])
    return {
        name: _tensor(pages, entry, 8 + length)
        for name, entry in header.items()
        if not name.startswith(("filling.", "__metadata__"))
    }


def _populate(pages: mmap.mmap, progress: Progress) -> None:
    """Makes all pages resident, each piece while the disk reads the next ones."""
    total = len(pages)
    # What the kernel does not know it cannot do ahead; the first use then does it.
    with suppress(OSError):
        pages.madvise(mmap.MADV_WILLNEED)
    for first in range(0, total, PIECE_BYTES):
        progress(first, total)
        with suppress(OSError):
            pages.madvise(_MADV_POPULATE_READ, first, min(PIECE_BYTES, total - first))
    progress(total, total)


def _tensor(pages: mmap.mmap, entry: dict[str, Any], data_start: int) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=data_start + begin)
    return flat.view(shape)


def _entry(tensor: torch.Tensor, position: int) -> dict[str, Any]:
    offsets = [position, position + tensor.nbytes]
    return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)
