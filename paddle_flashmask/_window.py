"""The row indices of a sliding window, as tensors."""

from __future__ import annotations

from typing import Any

import paddle

from ._checks import Sizes
from .masks import window_indices
from .masks.windows import parse_window

# Longer than any sequence, short enough for sums in int32 and for constants that pass through float32.
_FAR = 2**30


def window_bounds(
    window_size: Any, query: Any, key: Any, block_mask: Any | None, sizes: Sizes, causal: bool
) -> tuple[Any | None, bool]:
    """(startend_row_indices, causal) of a window: int32 `[batch, mask_heads, seqlen_k, n]`, or None: no mask.

    The indices have the mask heads of `block_mask`, or one, and lie on the device of query.
    """
    heads = 1 if block_mask is None else block_mask.shape[1]
    if sizes.batch is None or sizes.seqlen_q is None or sizes.seqlen_k is None or heads < 0:
        heads = heads if heads >= 0 else paddle.shape(block_mask)[1]
        return _unknown_sizes(window_size, query, key, heads, causal)
    bounds, causal = window_indices(window_size, sizes.seqlen_q, sizes.seqlen_k, causal, sizes.batch, heads)
    if bounds is None:
        return None, causal
    return paddle.to_tensor(bounds, place=query.place if paddle.in_dynamic_mode() else None), causal


def _unknown_sizes(window_size: Any, query: Any, key: Any, heads: Any, causal: bool) -> tuple[Any | None, bool]:
    """The same bounds as `masks.window_indices`, in operations on sizes that only the running program knows."""
    left, right = (min(side, _FAR) for side in parse_window(window_size))
    causal = causal or right == 0
    if left < 0 and (causal or right < 0):
        return None, causal
    query_shape, key_shape = paddle.shape(query), paddle.shape(key)
    seqlen_q, seqlen_k = query_shape[1], key_shape[1]
    diagonal = paddle.arange(0, seqlen_k, dtype="int32") - (seqlen_k - seqlen_q).astype("int32")
    # What lies outside [0, seqlen_q] is clipped by the kernel.
    bounds = [paddle.full_like(diagonal, _FAR) if left < 0 else diagonal + (left + 1)]
    if not causal:
        bounds.append(paddle.zeros_like(diagonal) if right < 0 else diagonal - right)
    stacked = paddle.stack(bounds, axis=-1).unsqueeze([0, 1])
    return paddle.expand(stacked, [query_shape[0], heads, -1, len(bounds)]), causal
