"""To the dense boolean mask and back. O(s_q * s_k) memory: for tests, small cases, and masks that come dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arguments import shown
from ._intervals import as_array, resolve
from ._validate import BLOCK
from .windows import WindowSize

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def to_dense(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    block_mask: Any = None,
    window_size: WindowSize | None = None,
) -> Bools:
    """The mask as a dense bool array: True = visible, query i may attend to key j.

    Args:
        startend_row_indices: int32 `[b, h_m, s_k, n]`, or None.
        causal: bool; picks the form together with n.
        seqlen_q: number of query rows.
        seqlen_k: number of key columns; None takes it from the indices, or seqlen_q without them.
        block_mask: int32 `[b, h_m, ceil(s_q / 128), ceil(s_k / 128)]`, 0 = masked, on top of the rest.
        window_size: integer or (left, right), -1 = unbounded; excludes indices.

    Returns:
        bool `[b, h_m, seqlen_q, seqlen_k]`; b = h_m = 1 if neither indices nor block_mask are given.

    Raises:
        TypeError, ValueError: as `validate`.
    """
    mask = resolve(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size)
    visible = ~mask.intervals().masks(np.arange(mask.seqlen_q))
    if mask.block_visible is not None:
        elements = mask.block_visible.repeat(BLOCK, axis=2).repeat(BLOCK, axis=3)
        visible = visible & elements[:, :, : mask.seqlen_q, : mask.seqlen_k]
    return visible


def from_dense(dense: Any, causal: bool | None = None) -> tuple[npt.NDArray[np.int32] | None, bool]:
    """The shortest `startend_row_indices` that stand for a dense mask.

    Args:
        dense: bool `[s_q, s_k]` or `[b, h_m, s_q, s_k]`, True = visible. Batches and heads share one form.
        causal: None tries both; True or False allows only the forms for that value.

    Returns:
        `(startend_row_indices, causal)`: None if the mask is full or plain causal for all batches and heads, else
        int32 `[b, h_m, s_k, n]` with the fewest columns n (causal=True where both values need as many).

    Raises:
        TypeError: `dense` is not bool, or `causal` neither bool nor None.
        ValueError: wrong rank, an empty axis, or a mask that no allowed form can express: the message names batch, head
            and column, and the rows in its way.
    """
    array = as_array(dense)
    if not isinstance(array, np.ndarray) or array.dtype != np.bool_:
        got = array.dtype if isinstance(array, np.ndarray) else shown(dense)
        raise TypeError(f"dense: expected a bool array (True = visible), got {got}")
    if array.ndim not in (2, 4):
        raise ValueError(f"dense: expected [s_q, s_k] or [b, h_m, s_q, s_k], got shape {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"dense: expected no empty axis, got shape {list(array.shape)}")
    if causal is not None and not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal: expected a bool or None, got {shown(causal)}")
    visible = array if array.ndim == 4 else array[None, None]
    if causal is not True and visible.all():
        return None, False

    seqlen_q, seqlen_k = visible.shape[2:]
    diagonal = np.arange(seqlen_k) - (seqlen_k - seqlen_q)  # rows before this one are the causal part of column j
    if causal is not False:
        indices = _causal_form(visible, diagonal, required=causal is True)
        if indices is None or indices.size:
            return indices, True
    visible_runs = _runs(visible)
    if (visible_runs.count <= 1).all():
        # A column without a visible row: start and end are then 0, so that [LTS, s_q) masks it whole.
        return _stacked(visible_runs.last_end, visible_runs.first_start), False
    return _two_intervals(~visible, diagonal), False


def _causal_form(visible: Bools, diagonal: Ints, required: bool) -> npt.NDArray[np.int32] | None:
    """Indices of a causal form, None if the causal part is all there is; of size 0 if no causal form will do."""
    seqlen_q = visible.shape[2]
    above = np.arange(seqlen_q)[:, None] < diagonal
    wrongly_visible = visible & above
    rest = _runs(~visible & ~above)
    if wrongly_visible.any() or (rest.count > 1).any():
        if not required:
            return np.empty((0, 0, 0, 0), np.int32)
        if wrongly_visible.any():
            b, h, j = _first_column(wrongly_visible.any(axis=2))
            row = int(wrongly_visible[b, h, :, j].argmax())
            raise ValueError(
                f"dense: column {j} of batch {b}, head {h} is visible to row {row}, which causal=True masks "
                f"(rows below {diagonal[j]}); expected a mask that hides them, or causal=False"
            )
        b, h, j = _first_column(rest.count > 1)
        raise ValueError(
            f"dense: column {j} of batch {b}, head {h} masks {rest.count[b, h, j]} separate spans of rows "
            f"besides the causal part, {_spans(~visible[b, h, :, j] & ~above[:, j])}; causal=True (n = 2) can hold one"
        )
    if not rest.count.any():
        return None
    empty = rest.count == 0
    start = np.where(empty, seqlen_q, rest.first_start)
    end = np.where(empty, seqlen_q, rest.last_end)
    return _stacked(start) if (end == seqlen_q).all() else _stacked(start, end)


def _two_intervals(masked: Bools, diagonal: Ints) -> npt.NDArray[np.int32]:
    """The form n = 4. A lone interval is called upper where it ends above the diagonal, so that neighbouring columns
    agree on what is which and the tiles' bounds stay tight."""
    runs = _runs(masked)
    if (runs.count > 2).any():
        b, h, j = _first_column(runs.count > 2)
        raise ValueError(
            f"dense: column {j} of batch {b}, head {h} masks {runs.count[b, h, j]} separate spans of rows, "
            f"{_spans(masked[b, h, :, j])}; expected at most 2 (n = 4)"
        )
    lone_upper = (runs.count == 1) & (runs.first_end <= diagonal)
    has_upper = (runs.count == 2) | lone_upper
    has_lower = (runs.count > 0) & ~lone_upper
    nothing = masked.shape[2]
    return _stacked(
        np.where(has_lower, runs.last_start, nothing),
        np.where(has_lower, runs.last_end, nothing),
        np.where(has_upper, runs.first_start, 0),
        np.where(has_upper, runs.first_end, 0),
    )


@dataclass(frozen=True)
class _Runs:
    """Runs of True rows of each column, `[b, h, s_k]`: how many, and the bounds of the first and the last; the bounds
    of a column without a run are 0."""

    count: Ints
    first_start: Ints
    first_end: Ints
    last_start: Ints
    last_end: Ints


def _runs(flags: Bools) -> _Runs:
    seqlen_q = flags.shape[2]
    begins, ends = flags.copy(), flags.copy()
    begins[:, :, 1:] &= ~flags[:, :, :-1]
    ends[:, :, :-1] &= ~flags[:, :, 1:]
    count = begins.sum(axis=2)
    some = count > 0
    return _Runs(
        count,
        begins.argmax(axis=2),
        np.where(some, ends.argmax(axis=2) + 1, 0),
        np.where(some, seqlen_q - 1 - begins[:, :, ::-1].argmax(axis=2), 0),
        np.where(some, seqlen_q - ends[:, :, ::-1].argmax(axis=2), 0),
    )


def _stacked(*bounds: Ints) -> npt.NDArray[np.int32]:
    return np.stack(bounds, axis=-1).astype(np.int32)


def _first_column(flags: Bools) -> tuple[int, int, int]:
    b, h, j = np.unravel_index(int(flags.argmax()), flags.shape)
    return int(b), int(h), int(j)


def _spans(flags: Bools) -> str:
    """The runs of True as text, at most four of them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    texts = [f"[{start}, {end})" for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")
