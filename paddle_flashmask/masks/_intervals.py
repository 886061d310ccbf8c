"""A mask as two half-open intervals of masked rows per key column: the algebra of custom_ops/flashmask/mask.h.

Both must agree to the element; tests/test_masks_blocks.py holds them together (`test_equal_to_the_kernels_header`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arguments import INT32_MAX, integer
from ._form import has_lower_end
from ._validate import validate
from .windows import WindowSize, window_indices

Rows = npt.NDArray[np.int32]

# An empty interval is stored so that it changes neither the smallest start nor the largest end of its neighbours.
EMPTY_START = INT32_MAX
EMPTY_END = int(np.iinfo(np.int32).min)


@dataclass(frozen=True)
class ColumnIntervals:
    """Masked rows of each column, `[lower_start, lower_end)` and `[upper_start, upper_end)`; arrays `[b, h, s_k]`."""

    lower_start: Rows
    lower_end: Rows
    upper_start: Rows
    upper_end: Rows

    def masked_rows_before(self, row: int) -> npt.NDArray[np.int64]:
        """How many of the rows [0, row) each column masks: `[b, h, s_k]`."""
        # Inclusion-exclusion: the intersection of two intervals is an interval too.
        both_start = np.maximum(self.lower_start, self.upper_start)
        both_end = np.minimum(self.lower_end, self.upper_end)
        lower = _overlap(self.lower_start, self.lower_end, row)
        upper = _overlap(self.upper_start, self.upper_end, row)
        return lower + upper - _overlap(both_start, both_end, row)

    def masks(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each column masks each of `rows`: `[b, h, len(rows), s_k]`."""
        row = rows[:, None]

        def inside(start: Rows, end: Rows) -> npt.NDArray[np.bool_]:
            return (row >= start[:, :, None]) & (row < end[:, :, None])

        return inside(self.lower_start, self.lower_end) | inside(self.upper_start, self.upper_end)


def _overlap(start: Rows, end: Rows, row: int) -> npt.NDArray[np.int64]:
    """Length of [start, end) cut to [0, row); starts are not negative."""
    return np.maximum(np.minimum(end, row).astype(np.int64) - start, 0)


def column_intervals(
    indices: npt.NDArray[np.int32] | None, causal: bool, seqlen_q: int, seqlen_k: int
) -> ColumnIntervals:
    """The intervals that `indices` (int32 `[b, h, s_k, n]` or None) stand for, clipped to [0, seqlen_q].

    Empty intervals and columns that no row sees are stored as mask.h stores them, so that they keep no tile from
    being skipped.
    """
    columns = np.arange(seqlen_k)[None, None]
    nothing = np.zeros((1, 1, seqlen_k), np.int32)
    lower = (nothing, nothing)
    upper: tuple[npt.NDArray[Any], npt.NDArray[Any]] = (nothing, nothing)
    if indices is not None:
        n = indices.shape[3]
        lower_end = indices[..., 1] if has_lower_end(n, causal) else np.full_like(indices[..., 0], seqlen_q)
        lower = (indices[..., 0], lower_end)
        nothing = np.zeros_like(lower[0])
        if not causal:
            upper = (indices[..., 2], indices[..., 3]) if n == 4 else (nothing, indices[..., 1])
    if causal:
        upper = (nothing, np.broadcast_to(columns - (seqlen_k - seqlen_q), nothing.shape))
    ls, le = (np.clip(bound, 0, seqlen_q).astype(np.int32) for bound in lower)
    us, ue = (np.clip(bound, 0, seqlen_q).astype(np.int32) for bound in upper)
    for start, end in ((ls, le), (us, ue)):
        empty = start >= end
        start[empty], end[empty] = EMPTY_START, EMPTY_END

    first_start, second_start = np.minimum(ls, us), np.maximum(ls, us)
    first_end = np.where(ls <= us, le, ue)  # of two that start together either may come first
    reach = np.maximum(le, ue)
    joined = (second_start <= first_end) | (first_end == seqlen_q)
    dead = (first_start == 0) & joined & (reach == seqlen_q)
    for start, end in ((ls, le), (us, ue)):
        start[dead], end[dead] = 0, seqlen_q
    return ColumnIntervals(ls, le, us, ue)


@dataclass(frozen=True)
class ResolvedMask:
    """The mask arguments of a call, checked, with `window_size` turned into indices."""

    indices: npt.NDArray[np.int32] | None
    causal: bool
    seqlen_q: int
    seqlen_k: int
    block_visible: npt.NDArray[np.bool_] | None  # [b, h, ceil(s_q / 128), ceil(s_k / 128)]

    def intervals(self) -> ColumnIntervals:
        return column_intervals(self.indices, self.causal, self.seqlen_q, self.seqlen_k)

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        """The first two axes; 1 and 1 if all samples and heads share one mask."""
        array = self.block_visible if self.block_visible is not None else self.indices
        return (1, 1) if array is None else (int(array.shape[0]), int(array.shape[1]))


def as_array(value: Any) -> Any:
    """A tensor that has `.numpy()` as an array; anything else as it is."""
    return value.numpy() if hasattr(value, "numpy") and callable(value.numpy) else value


def resolve(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    block_mask: Any = None,
    window_size: WindowSize | None = None,
    batch: int | None = None,
    heads_q: int | None = None,
) -> ResolvedMask:
    """Checks the arguments as the attention call does (errors: see `validate`) and brings them into one form.

    `seqlen_k` of None is that of the indices, or seqlen_q without them.
    """
    indices, blocks = as_array(startend_row_indices), as_array(block_mask)
    seqlen_q = integer("seqlen_q", seqlen_q, 1)
    if seqlen_k is not None:
        seqlen_k = integer("seqlen_k", seqlen_k, 1)
    elif indices is None or len(getattr(indices, "shape", ())) != 4:  # a wrong rank is left for validate to name
        seqlen_k = seqlen_q
    else:
        seqlen_k = int(indices.shape[2])
    validate(
        indices,
        causal,
        batch=batch,
        heads_q=heads_q,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k or None,  # 0 came from the indices' shape: validate then names that
        block_mask=blocks,
        window_size=window_size,
    )
    causal = bool(causal)
    if window_size is not None:
        indices, causal = window_indices(window_size, seqlen_q, seqlen_k, causal)
    return ResolvedMask(indices, causal, seqlen_q, seqlen_k, None if blocks is None else np.asarray(blocks) != 0)
