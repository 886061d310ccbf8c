"""Reading PaddleNLP's data formats: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ._common import require_unicode

__all__ = ["read_lines", "read_pairs"]

Checked = TypeVar("Checked")


def read_lines(path: str | os.PathLike[str], check: Callable[[Any], Checked]) -> Iterator[Checked]:
    """What ``check`` makes of the JSON of each line that is not blank. A ValueError from it gets file and line."""
    # What is not UTF-8 is kept as surrogates, so that it stops the line that it is in, which can then be named.
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                checked = check(_parsed(line))
            except (ValueError, RecursionError) as error:
                reason = "lists or objects are nested too deeply" if isinstance(error, RecursionError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from error
            yield checked


def _parsed(line: str) -> Any:
    try:
        line.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} at byte {error.start}"
        raise ValueError(f"not UTF-8 ({error.reason}: {byte})") from error
    try:
        return json.loads(line)
    except ValueError as error:  # also of a number with too many digits
        raise ValueError(f"not JSON ({error})") from error


def read_pairs(path: str | os.PathLike[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Prompts and answers from a file of PaddleNLP's SFT format: one JSON object a line, with ``src`` and ``tgt``.

    Args:
        path: a UTF-8 file. ``src`` and ``tgt`` are strings, or lists of equally many strings (the turns of a
            conversation). Blank lines are passed over.

    Yields:
        ``(src, tgt)``, both as lists; see ``encode_pair``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not of the format. The message names file and line.
    """
    yield from read_lines(path, _pair)


def _pair(record: Any) -> tuple[list[str], list[str]]:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with src and tgt, got {type(record).__name__}")
    sides = []
    for key in ("src", "tgt"):
        turns = record.get(key)
        turns = [turns] if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{key} must be a string or a list of strings, got {json.dumps(turns)[:80]}")
        for turn in turns:
            require_unicode(key, turn)
        sides.append(turns)
    source, target = sides
    if len(source) != len(target):
        raise ValueError(f"src has {len(source)} turns and tgt {len(target)}")
    if not all(turn.strip() for turn in target):
        raise ValueError("tgt has an empty answer")
    return source, target
