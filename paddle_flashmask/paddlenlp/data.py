"""Reading PaddleNLP's data format for supervised fine-tuning."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

__all__ = ["read_pairs"]


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
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number}: expected an object with src and tgt, got {type(record).__name__}"
                )
            sides = []
            for key in ("src", "tgt"):
                turns = record.get(key)
                turns = [turns] if isinstance(turns, str) else turns
                if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                    got = json.dumps(turns)[:80]
                    raise ValueError(f"{path}, line {number}: {key} must be a string or a list of strings, got {got}")
                sides.append(turns)
            source, target = sides
            if len(source) != len(target):
                raise ValueError(f"{path}, line {number}: src has {len(source)} turns and tgt {len(target)}")
            if not all(turn.strip() for turn in target):
                raise ValueError(f"{path}, line {number}: tgt has an empty answer")
            yield source, target
