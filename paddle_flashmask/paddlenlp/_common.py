"""What the modules of packing and preference data share."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "drops_masks_by_environment",
    "finite",
    "integers",
    "refuse_dropped_mask",
    "require_choice",
    "require_keys",
    "require_pad_token",
    "require_positive",
    "require_unicode",
    "spread",
    "token_array",
    "token_ids",
]


def require_positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_pad_token(value: Any) -> int:
    hint = "If the tokenizer has no pad token, pass tokenizer.eos_token_id: padding is masked, any token will do"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"pad_token_id must be an integer, got {type(value).__name__}{f'. {hint}' if value is None else ''}"
        )
    if not 0 <= value < 2**31:  # no row of an embedding
        raise ValueError(f"pad_token_id must be a token id from 0 to 2**31 - 1, got {value}. {hint}")
    return int(value)


def require_keys(index: int, row: Any, keys: Sequence[str], maker: str) -> None:
    """Check that a collator's row is one that ``maker`` makes."""
    if not isinstance(row, Mapping) or not set(keys) <= set(row):
        got = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        missing = [key for key in keys if key not in row] if isinstance(row, Mapping) else keys
        raise TypeError(f"rows[{index}] must be a row of {maker}, with {', '.join(missing)}; got {got}")


def integers(name: str, value: Any) -> np.ndarray:
    """``value`` as an array ``[n]`` of integers. NumPy takes an empty list for floats; here it may be empty."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # nested lists of different lengths
        raise TypeError(f"{name} must be a list of integers, got {type(value).__name__} ({error})") from None
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{name} must be a list of integers, got {array.dtype} of shape {list(array.shape)}")
    return array if array.size else array.astype(np.int64)


def token_array(name: str, value: Any, ignored: int | None = None) -> np.ndarray:
    """``value`` as int64 ``[n]`` of token ids, from 0 to 2**31 - 1, or of these and ``ignored``."""
    array = integers(name, value)
    wrong = (array < 0) | (array >= 2**31)
    if ignored is not None:
        wrong &= array != ignored
    if wrong.any():
        place = int(wrong.argmax())
        also = "" if ignored is None else f", or {ignored}"
        raise ValueError(f"{name} must be token ids from 0 to 2**31 - 1{also}; got {array[place]} at place {place}")
    return array.astype(np.int64)


def drops_masks_by_environment() -> bool:
    """Whether the environment tells PaddleNLP to ignore ``attention_mask``, with ``use_flash_attention`` or without."""
    return os.getenv("USE_CASUAL_MASK") == "True"


def refuse_dropped_mask(mask: str) -> None:
    """Refuse a collator's dense mask that the models would ignore: the routing that checks them may be off."""
    if mask == "dense" and drops_masks_by_environment():
        raise ValueError(
            'mask="dense" with USE_CASUAL_MASK=True in the environment: PaddleNLP ignores attention_mask then and '
            'trains plain causal attention across the packed samples. Unset USE_CASUAL_MASK, or use mask="flashmask"'
        )


def spread(sizes: Sequence[int] | np.ndarray) -> tuple[int, int, int]:
    """Shortest, median and longest."""
    return int(min(sizes)), int(np.median(sizes)), int(max(sizes))


def finite(value: Any) -> bool:
    """Whether ``value`` is a number, neither infinite nor too large for a float."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_unicode(name: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell (``"\\ud83d"``) and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be Unicode text, got a lone surrogate at character {error.start}") from None


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    def encoded(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    ids = encoded(text, add_special_tokens)
    eos = tokenizer.eos_token_id
    if add_special_tokens and len(ids) > 1 and ids[-1] == eos:
        # Some tokenizers close every text; between prompt and answer the end must not stand. An eos that the text
        # itself ends in, as a chat template may have it, stays: T5's tokenizers add none behind it, others a second.
        closes = encoded("a", True)[-1] == eos != encoded("a", False)[-1]
        if closes and _closing(ids, eos) > _closing(encoded(text, False), eos):
            ids.pop()
    return ids


def _closing(ids: Sequence[int], eos: int) -> int:
    """How many ``eos`` stand at the end."""
    return next((count for count, token in enumerate(reversed(ids)) if token != eos), len(ids))
