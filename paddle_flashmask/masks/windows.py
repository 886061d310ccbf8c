"""Masks that depend on the distance of query and key, and the bidirectional prefix.

The builders return `(startend_row_indices, causal)`, int32 `[b, 1, S, n]`; padding as in documents.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._arguments import INT32_MAX, Lengths, integer, per_sample, sample_lengths, shown
from ._form import Mask, fully_masked

WindowSize = int | tuple[int, int] | list[int]


def full() -> tuple[None, bool]:
    """No mask: every query sees every key. Returns `(None, False)`."""
    return None, False


def causal() -> tuple[None, bool]:
    """Plain causal mask, aligned to the bottom right. Returns `(None, True)`."""
    return None, True


def sliding_window(lengths: int | Lengths, window: int, seqlen: int | None = None) -> Mask:
    """Causal window: query i sees the `window` keys i - window + 1 .. i. n = 1, causal.

    `window` counts the query's own key; the call's `window_size=w` does not (w keys back plus itself), so
    `sliding_window(s, w + 1)` equals `window_size=w` with `causal=True`.

    Args:
        lengths: length of each sample; an integer is one sample.
        window: number of keys that a query sees, at least 1.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: a value that is no integer.
        ValueError: no sample, a length or window below 1, or a sample longer than `seqlen`.
    """
    totals, seqlen = sample_lengths(lengths, seqlen)
    window = integer("window", window, 1)
    indices = fully_masked(len(totals), 1, seqlen, 1, True)
    for out, total in zip(indices[:, 0], totals, strict=True):
        out[:total, 0] = np.minimum(np.arange(total) + window, total)
    return indices, True


def global_sliding_window(
    lengths: int | Lengths, global_tokens: int, left: int, right: int, seqlen: int | None = None
) -> Mask:
    """Window both ways plus global tokens that see all and are seen by all. n = 4, not causal.

    Args:
        lengths: length of each sample; an integer is one sample.
        global_tokens: the first tokens of each row, as many as this, are global; 0 is allowed.
        left: how many keys before its own a query sees (LTS = j + left + 1).
        right: how many keys after its own a query sees (UTE = j - right).
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: a value that is no integer.
        ValueError: no sample, a length below 1, a negative count, or a sample longer than `seqlen`.
    """
    totals, seqlen = sample_lengths(lengths, seqlen)
    global_tokens = integer("global_tokens", global_tokens, 0)
    left, right = integer("left", left, 0), integer("right", right, 0)
    indices = fully_masked(len(totals), 1, seqlen, 4, False)
    for out, total in zip(indices[:, 0], totals, strict=True):
        token = np.arange(total)
        many = min(global_tokens, total)
        out[:total, 0] = np.where(token < many, total, np.minimum(token + left + 1, total))
        out[:total, 2] = many
        out[:total, 3] = np.maximum(token - right, many)
    return indices, False


def prefix_lm_causal(lengths: int | Lengths, prefix: int | Lengths, seqlen: int | None = None) -> Mask:
    """The first `prefix` tokens see each other, the rest is causal. n = 2, not causal.

    Args:
        lengths: length of each sample; an integer is one sample.
        prefix: length of the prefix, one for all samples or one each; 0 is plain causal.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: a value that is no integer.
        ValueError: no sample, a length below 1, a prefix that is negative or longer than its sample, or a sample
            longer than `seqlen`.
    """
    totals, seqlen = sample_lengths(lengths, seqlen)
    indices = fully_masked(len(totals), 1, seqlen, 2, False)
    for i, many in enumerate(per_sample("prefix", prefix, totals)):
        out, total = indices[i, 0], totals[i]
        token = np.arange(total)
        out[:total, 0] = total
        out[:total, 1] = np.where(token < many, 0, token)
    return indices, False


def parse_window(window_size: Any) -> tuple[int, int]:
    """`window_size` as (left, right); -1 on a side is unbounded."""
    sides = list(window_size) if isinstance(window_size, list | tuple) else [window_size] * 2
    if len(sides) != 2:
        raise ValueError(f"window_size: expected an integer or (left, right), got {shown(window_size)}")
    named = isinstance(window_size, list | tuple)
    left, right = (integer(f"window_size[{k}]" if named else "window_size", side, -1) for k, side in enumerate(sides))
    return left, right


def window_indices(
    window_size: WindowSize, seqlen_q: int, seqlen_k: int, causal: bool, batch: int = 1, heads: int = 1
) -> tuple[npt.NDArray[np.int32] | None, bool]:
    """The indices that `window_size` of the attention call stands for.

    Query i sees the keys j with `i + shift - left <= j <= i + shift + right`, where `shift = seqlen_k - seqlen_q`
    aligns the last query with the last key.

    Args:
        window_size: (left, right), or one integer for both; -1 is unbounded on that side.
        causal: the right side is 0 whatever `window_size` says.
        batch, heads: sizes of the first two axes of the result.

    Returns:
        `(startend_row_indices, causal)`: int32 `[batch, heads, seqlen_k, n]` in the shortest form, or None if
        the window hides nothing but the causal part.

    Raises:
        TypeError: a value that is no integer, or a `causal` that is no bool.
        ValueError: a side below -1, more than two sides, or a size below 1.
    """
    seqlen_q, seqlen_k = integer("seqlen_q", seqlen_q, 1), integer("seqlen_k", seqlen_k, 1)
    batch, heads = integer("batch", batch, 1), integer("heads", heads, 1)
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal: expected a bool, got {shown(causal)}")
    left, right = parse_window(window_size)
    if causal:
        right = 0
    if left < 0 and right <= 0:
        return None, right == 0
    diagonal = np.arange(seqlen_k) - (seqlen_k - seqlen_q)  # the row that key j stands beside
    lts = np.clip(diagonal + (left if left >= 0 else INT32_MAX) + 1, 0, seqlen_q)
    bounds = [lts]
    if right != 0:
        bounds.append(np.clip(diagonal - (right if right > 0 else INT32_MAX), 0, seqlen_q))
    indices = np.empty((batch, heads, seqlen_k, len(bounds)), np.int32)
    indices[:] = np.stack(bounds, axis=-1)
    return indices, right == 0
