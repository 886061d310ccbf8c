"""What prepare.py blanks in a shared library, and what it must leave alone."""

from __future__ import annotations

import slim


def container(*entries: tuple[int, bytes]) -> bytes:
    body = b"".join(slim.ENTRY.pack(kind, 0x101, 24, len(code)) + b"options." + code for kind, code in entries)
    return slim.CONTAINER.pack(slim.CONTAINER_MAGIC, 1, slim.CONTAINER.size, len(body)) + body


def test_device_code_alone_is_blanked(tmp_path):
    magic = slim.CONTAINER.pack(slim.CONTAINER_MAGIC, 1, slim.CONTAINER.size, 2**40)[:4]
    library = tmp_path / "library.so"
    image = b"host code" + magic + b"the same four bytes by chance" + container((2, b"sm_80 code"), (1, b"ptx"))
    image += b"more host code" + container((2, b"sm_86")) + b"end" + magic
    library.write_bytes(image)
    assert slim.blank_device_code(library) == len(b"sm_80 code") + len(b"ptx") + len(b"sm_86")
    expected = image
    for code in (b"sm_80 code", b"ptx", b"sm_86"):
        expected = expected.replace(code, bytes(len(code)))
    assert library.read_bytes() == expected
    assert slim.blank_device_code(library) == len(b"sm_80 code") + len(b"ptx") + len(b"sm_86"), (
        "the layout must survive"
    )
