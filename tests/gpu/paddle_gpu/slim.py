"""Makes a GPU build of Paddle small enough to carry: blanks the device code in its shared libraries.

Most of such a wheel is machine code for GPUs. Where the GPU at hand is newer than all of it (PyPI's last wheel, 2.6.2,
ends at sm_86), none of it can run, and nothing is lost but size: blanked, it compresses to nothing. Host code, symbols
and every offset stay as they are.

What the kernels of such a Paddle leave in their outputs is garbage, and no error is raised. Copies between host and
device, streams, the allocator, autograd's bookkeeping and custom ops work. See README.md beside this file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

# A fat binary, as nvcc embeds it: a container header, then entries of an own header and a payload each.
CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes after it
CONTAINER_MAGIC = 0xBA55ED50
ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of the entry's header, bytes of its payload
ENTRY_KINDS = (1, 2)  # PTX, ELF


def device_code(image: bytes | mmap.mmap) -> Iterator[tuple[int, int]]:
    """(start, end) of every piece of device code in the bytes of a shared library."""
    magic = struct.pack("<I", CONTAINER_MAGIC)
    position = image.find(magic)
    while position != -1:
        resume = position + len(magic)
        if position + CONTAINER.size <= len(image):
            _, version, header_bytes, body_bytes = CONTAINER.unpack_from(image, position)
            end = position + header_bytes + body_bytes
            # Four equal bytes elsewhere are no container.
            if (version, header_bytes) == (1, CONTAINER.size) and end <= len(image):
                yield from _entries(image, position + header_bytes, end)
                resume = end
        position = image.find(magic, resume)


def _entries(image: bytes | mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int]]:
    while position + ENTRY.size <= end:
        kind, _, header_bytes, payload_bytes = ENTRY.unpack_from(image, position)
        start, position = position + header_bytes, position + header_bytes + payload_bytes
        if kind not in ENTRY_KINDS or position > end:
            return
        yield start, position


def blank_device_code(library: Path) -> int:
    """Overwrites the device code in `library` with zeros, in place; returns how many bytes that were."""
    blanked = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        for start, end in list(device_code(image)):
            image[start:end] = bytes(end - start)
            blanked += end - start
    return blanked
