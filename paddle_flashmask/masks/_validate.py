"""What a mask must look like: the one place that says so, for the attention call and for this package alike.

Only shapes and dtypes are read, so NumPy arrays, eager tensors and the variables of a static program all do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arguments import integer, shown
from ._form import FORMS
from .windows import WindowSize, parse_window

BLOCK = 128
"""Rows and columns of one entry of `block_mask`."""

Shape = tuple[int | None, ...]


def validate(
    startend_row_indices: Any,
    causal: bool,
    *,
    batch: int | None = None,
    heads_q: int | None = None,
    heads_k: int | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    block_mask: Any = None,
    window_size: WindowSize | None = None,
) -> None:
    """Checks the mask arguments of an attention call; returns nothing, raises if one is wrong.

    Row values need no check: whatever they are, they are clipped to [0, seqlen_q].

    Args:
        startend_row_indices: int32 `[batch, h_m, seqlen_k, n]` with h_m in {1, heads_k, heads_q} and (n, causal) one
            of (1, True), (2, True), (2, False), (4, False); or None. An array or tensor of any library: only `.shape`
            and `.dtype` are read.
        causal: bool.
        batch, heads_q, heads_k, seqlen_q, seqlen_k: sizes that query and key have; what depends on one that is None
            is not checked. Dimensions of -1 or None (a static program's unknown ones) are not checked either.
        block_mask: int32 `[batch, h_m, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]`, h_m as that of
            `startend_row_indices` if both are given; or None.
        window_size: integer >= -1, or two of them, (left, right); or None. Excludes `startend_row_indices`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong rank, dimension or combination. Both name the argument, what was expected and what came.
    """
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal: expected a bool, got {shown(causal)}")
    sizes = {"batch": batch, "heads_q": heads_q, "heads_k": heads_k, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    for name, size in sizes.items():
        sizes[name] = None if size is None or size == -1 else integer(name, size, 1)
    batch, heads_q, heads_k, seqlen_q, seqlen_k = sizes.values()
    if heads_q is not None and heads_k is not None and heads_q % heads_k:
        raise ValueError(f"heads_q: expected a multiple of heads_k = {heads_k}, got {heads_q}")

    mask_heads: int | None = None
    if startend_row_indices is not None:
        if window_size is not None:
            raise ValueError(
                "window_size: expected None when startend_row_indices is given (it would build other indices), "
                f"got {shown(window_size)}"
            )
        name = "startend_row_indices"
        shape = _shape(name, startend_row_indices, "[batch, mask heads, seqlen_k, n]")
        _check_dtype(name, startend_row_indices)
        n = shape[3]
        if n is not None and (n, bool(causal)) not in FORMS:
            allowed = " or ".join(str(k) for k, c in FORMS if c == bool(causal))
            raise ValueError(f"{name}.shape[3]: expected {allowed} when causal={bool(causal)}, got {n}")
        _check_size(name, shape, 0, "the batch size", batch)
        _check_heads(name, shape[1], heads_q, heads_k)
        _check_size(name, shape, 2, "seqlen_k", seqlen_k)
        mask_heads = shape[1]
        batch = shape[0] if batch is None else batch
    if window_size is not None:
        parse_window(window_size)
    if block_mask is not None:
        name = "block_mask"
        shape = _shape(name, block_mask, f"[batch, mask heads, ceil(seqlen_q / {BLOCK}), ceil(seqlen_k / {BLOCK})]")
        _check_dtype(name, block_mask)
        _check_size(name, shape, 0, "the batch size", batch)
        if mask_heads is None:
            _check_heads(name, shape[1], heads_q, heads_k)
        else:
            _check_size(name, shape, 1, "startend_row_indices.shape[1]", mask_heads)
        for axis, which, size in ((2, "seqlen_q", seqlen_q), (3, "seqlen_k", seqlen_k)):
            blocks = None if size is None else -(-size // BLOCK)
            _check_size(name, shape, axis, f"ceil({which} / {BLOCK})", blocks)


def _shape(name: str, array: Any, expected: str) -> Shape:
    """The four dimensions of an array; None for one that is unknown."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name}: expected an int32 array {expected}, got {shown(array)}")
    shape = tuple(array.shape)
    if len(shape) != 4:
        raise ValueError(f"{name}: expected rank 4, {expected}, got shape {list(shape)}")
    for axis, size in enumerate(shape):
        if size == 0:
            raise ValueError(f"{name}.shape[{axis}]: expected at least 1, got 0 (shape {list(shape)})")
    return tuple(None if size is None or size < 0 else int(size) for size in shape)


def _check_dtype(name: str, array: Any) -> None:
    # str() is the one spelling that NumPy ("int32") and every Paddle version ("paddle.int32") share.
    if str(array.dtype).rsplit(".", 1)[-1] != "int32":
        raise TypeError(f"{name}.dtype: expected int32, got {array.dtype}")


def _check_size(name: str, shape: Shape, axis: int, meaning: str, expected: int | None) -> None:
    if expected is not None and shape[axis] is not None and shape[axis] != expected:
        raise ValueError(f"{name}.shape[{axis}]: expected {meaning} = {expected}, got {shape[axis]}")


def _check_heads(name: str, heads: int | None, heads_q: int | None, heads_k: int | None) -> None:
    if heads is None or heads == 1 or heads in (heads_k, heads_q):
        return
    if heads_k is None and (heads_q is None or heads_q % heads == 0):  # it may be heads_k
        return
    if heads_k is not None and heads_q is None and heads % heads_k == 0:  # it may be heads_q
        return
    known = {"heads_k": heads_k, "heads_q": heads_q}
    allowed = ["1"] + [f"{key} = {value}" for key, value in known.items() if value is not None]
    raise ValueError(f"{name}.shape[1]: expected {' or '.join(allowed)}, got {heads}")
