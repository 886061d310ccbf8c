"""Preference data: prompts with several answers and their order, from PaddleNLP's file format to tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from ._common import finite, require_positive, require_unicode, token_ids
from .data import read_lines

__all__ = ["EncodedPreference", "Preference", "encode_preference", "read_preferences"]


class Preference(TypedDict):
    """A prompt and two or more answers to it, as text.

    ``src`` are the user's turns, ``tgt`` the answers to all of them but the last, ``response`` the answers to the last
    one, and ``sort`` one number for each of those: the higher, the better.
    """

    src: list[str]
    tgt: list[str]
    response: list[str]
    sort: list[float]


class EncodedPreference(TypedDict):
    """The same as tokens: ``responses`` from the best to the worst, each with its eos; ``sort`` in that order."""

    prompt: list[int]
    responses: list[list[int]]
    sort: list[float]


def read_preferences(path: str | os.PathLike[str], responses: int | None = None) -> Iterator[Preference]:
    """Samples of PaddleNLP's format for DPO and reward models: one JSON object a line.

    ``{"src": ["question"], "tgt": [], "response": ["good", "bad"], "sort": [1, 0]}``. ``src`` has one turn more than
    ``tgt`` (either may be a string; a missing ``tgt`` is empty). ``sort`` ranks ``response``: higher is better. Blank
    lines are passed over.

    Args:
        path: a UTF-8 file.
        responses: how many answers every sample must have: 2 for DPO. With None, two or more; some may rank equally.

    Yields:
        The samples, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not of the format. The message names file and line.
    """
    if responses is not None and require_positive("responses", responses) < 2:
        raise ValueError(f"responses must be at least 2 or None, got {responses}")
    yield from read_lines(path, lambda record: _checked(record, responses))


def _strings(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key, [] if key == "tgt" else None)
    value = [value] if isinstance(value, str) and key != "response" else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
        single = "" if key == "response" else "a string or "
        got = json.dumps(value, default=repr)[:80] if key in record or key == "tgt" else "nothing"
        raise ValueError(f"{key} must be {single}a list of strings, got {got}")
    for text in value:
        require_unicode(key, text)
    return list(value)


def _checked(record: Any, responses: int | None = None) -> Preference:
    """`record` in a form without variants."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object with src, tgt, response and sort, got {type(record).__name__}")
    src, tgt, response = (_strings(record, key) for key in ("src", "tgt", "response"))
    sort = record.get("sort")
    if not isinstance(sort, (list, tuple)) or not all(finite(rank) for rank in sort):
        raise ValueError(f"sort must be a list of numbers, got {json.dumps(sort, default=repr)[:80]}")
    if not src or len(src) != len(tgt) + 1:
        raise ValueError(f"src must have one turn more than tgt, got {len(src)} and {len(tgt)}")
    if not all(turn.strip() for turn in tgt):
        raise ValueError("tgt has an empty answer")
    if len(response) < 2 or (responses is not None and len(response) != responses):
        raise ValueError(f"response must hold {responses or 'at least 2'} answers, got {len(response)}")
    empty = [number for number, text in enumerate(response) if not text.strip()]
    if empty:
        raise ValueError(f"response has an empty answer, number {empty[0]} (from 0)")
    if len(sort) != len(response):
        raise ValueError(f"sort must have a number for each response, got {len(sort)} for {len(response)}")
    if min(sort) == max(sort):
        raise ValueError(f"sort must tell better from worse, got {sort[0]} for every response")
    if responses == 2 and response[0] == response[1]:
        raise ValueError("response holds the same answer twice")
    return {"src": src, "tgt": tgt, "response": response, "sort": list(sort)}


def encode_preference(tokenizer: Any, sample: Mapping[str, Any]) -> EncodedPreference:
    """Tokens of a prompt and its answers. Nothing is stripped or truncated.

    The prompt is the turns so far, each answer in it closed by eos; the answers to the last turn are closed by eos too.

    Args:
        tokenizer: a PaddleNLP (or transformers) tokenizer with an ``eos_token_id``.
        sample: as ``read_preferences`` yields it.

    Returns:
        ``{"prompt": [...], "responses": [[...], ...], "sort": [...]}``, the best answer first.

    Raises:
        ValueError: a sample that is not of the format, a prompt or an answer without tokens, a tokenizer without eos.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token: without it the model never learns to stop")
    checked = _checked(sample)
    prompt: list[int] = []
    for number, turn in enumerate(checked["src"]):
        prompt += token_ids(tokenizer, turn, add_special_tokens=number == 0)
        if number < len(checked["tgt"]):
            prompt += _answer(tokenizer, checked["tgt"][number])
    if not prompt:
        raise ValueError(f"src must have at least one token, got {checked['src']!r}")
    # Stable: answers of one rank stay in the order of the file.
    order = sorted(range(len(checked["sort"])), key=lambda index: -checked["sort"][index])
    return {
        "prompt": prompt,
        "responses": [_answer(tokenizer, checked["response"][index]) for index in order],
        "sort": [checked["sort"][index] for index in order],
    }


def _answer(tokenizer: Any, text: str) -> list[int]:
    tokens: Sequence[int] = token_ids(tokenizer, text, add_special_tokens=False)
    if not tokens:
        raise ValueError(f"an answer has no tokens: {text!r}")
    return [*tokens, tokenizer.eos_token_id]
