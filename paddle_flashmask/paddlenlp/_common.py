"""What the modules of packing and preference data share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "drops_masks_by_environment",
    "refuse_dropped_mask",
    "require_choice",
    "require_keys",
    "require_pad_token",
    "require_positive",
    "spread",
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
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        hint = (
            ". If the tokenizer has no pad token, pass tokenizer.eos_token_id: padding is masked, any token will do"
            if value is None
            else ""
        )
        raise TypeError(f"pad_token_id must be an integer, got {type(value).__name__}{hint}")
    return int(value)


def require_keys(index: int, row: Any, keys: Sequence[str], maker: str) -> None:
    """Check that a collator's row is one that ``maker`` makes."""
    if not isinstance(row, Mapping) or not set(keys) <= set(row):
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        missing = [key for key in keys if key not in row] if isinstance(row, Mapping) else keys
        raise TypeError(f"rows[{index}] must be a row of {maker}, with {', '.join(missing)}; got {got}")


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


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    # Some tokenizers close every text; between prompt and answer the end must not stand.
    if add_special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
