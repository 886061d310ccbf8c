"""Tiles of the score matrix: which are skipped, which need the element mask, and what that saves.

Memory is O(tiles + columns), never O(s_q * s_k).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arguments import integer, shown
from ._intervals import ColumnIntervals, ResolvedMask, Rows, resolve
from ._validate import BLOCK
from .windows import WindowSize


class TileClass(IntEnum):
    """What a kernel does with a tile."""

    FULLY_MASKED = 0  # skipped
    PARTIAL = 1  # computed, then masked element by element
    UNMASKED = 2  # computed without mask arithmetic


@dataclass(frozen=True)
class TileCounts:
    """Numbers of tiles by class, summed over the batch."""

    fully_masked: int
    partial: int
    unmasked: int

    @property
    def total(self) -> int:
        return self.fully_masked + self.partial + self.unmasked

    @property
    def computed(self) -> int:
        return self.partial + self.unmasked


@dataclass(frozen=True)
class BlockStats:
    """What a mask saves. Counts and fractions are over batch and mask heads; FLOPs over batch and query heads."""

    tile: tuple[int, int]
    """Rows and columns of a tile."""
    total: TileCounts
    per_head: tuple[TileCounts, ...]
    """One a mask head."""
    visible_fraction: float
    """Visible scores / all scores: the true area."""
    tile_fraction: float
    """Scores in computed tiles / all scores. Not below `visible_fraction`; the difference is computed in vain."""
    flops_dense: int | None
    """Of a forward pass that computes every score (2 matmuls: 4 * head_dim a score); None without head_dim."""
    flops_computed: int | None
    """Of a forward pass that skips fully masked tiles. A backward pass (5 matmuls) takes 2.5 times that."""

    @property
    def flops_skipped(self) -> int | None:
        if self.flops_dense is None or self.flops_computed is None:
            return None
        return self.flops_dense - self.flops_computed


def block_classes(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    tile: tuple[int, int] = (BLOCK, BLOCK),
    block_mask: Any = None,
    window_size: WindowSize | None = None,
) -> npt.NDArray[np.int8]:
    """The class of every tile, as the kernels judge it: from the smallest and largest bounds of its columns.

    The judgement errs on one side only: a tile with a visible element is never FULLY_MASKED and an UNMASKED tile has
    no masked element, but a tile that two intervals mask between them may be called PARTIAL.

    Args:
        startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size: as for `to_dense`.
        tile: rows and columns of a tile.

    Returns:
        int8 `[b, h_m, ceil(seqlen_q / rows), ceil(seqlen_k / columns)]` of `TileClass` values.

    Raises:
        TypeError, ValueError: as `validate`; or a tile that is not two integers of at least 1.
    """
    mask = resolve(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size)
    return _classify(mask, mask.intervals(), _parse_tile(tile))


def block_stats(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    batch: int | None = None,
    heads_q: int | None = None,
    tile: tuple[int, int] = (BLOCK, BLOCK),
    head_dim: int | None = None,
    block_mask: Any = None,
    window_size: WindowSize | None = None,
) -> BlockStats:
    """How many tiles are skipped, and what that saves.

    Args:
        startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size: as for `to_dense`.
        batch, heads_q: samples and query heads, for the FLOPs; None takes what the mask has. Mask heads broadcast.
        tile: rows and columns of a tile.
        head_dim: of query, key and value; None leaves the FLOPs out.

    Raises:
        TypeError, ValueError: as `validate`; or batch, heads_q, head_dim or a side of the tile is not an integer of at
            least 1.
    """
    tile = _parse_tile(tile)
    # Here, because -1 is an axis of unknown size to `validate`.
    batch, heads_q, head_dim = (
        None if value is None else integer(name, value, 1)
        for name, value in (("batch", batch), ("heads_q", heads_q), ("head_dim", head_dim))
    )
    mask = resolve(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size, batch, heads_q)
    intervals = mask.intervals()
    classes = _classify(mask, intervals, tile)

    mask_batch, mask_heads = mask.batch_and_heads
    per_head = tuple(
        TileCounts(*np.bincount(classes[:, h].ravel(), minlength=len(TileClass)).tolist()) for h in range(mask_heads)
    )
    total = TileCounts(
        sum(c.fully_masked for c in per_head), sum(c.partial for c in per_head), sum(c.unmasked for c in per_head)
    )
    scores = mask.seqlen_q * mask.seqlen_k * mask_batch * mask_heads
    tile_rows, tile_columns = (
        np.diff(tile_edges(size, step)) for size, step in ((mask.seqlen_q, tile[0]), (mask.seqlen_k, tile[1]))
    )
    computed_columns = (classes != TileClass.FULLY_MASKED) @ tile_columns  # scores of each row of tiles / its rows
    computed = int(computed_columns.sum(axis=(0, 1)) @ tile_rows)

    flops_dense = flops_computed = None
    if head_dim is not None:
        copies = (batch or mask_batch) // mask_batch * ((heads_q or mask_heads) // mask_heads)
        flops_dense, flops_computed = (4 * head_dim * copies * area for area in (scores, computed))
    return BlockStats(
        tile, total, per_head, _visible_scores(mask, intervals) / scores, computed / scores, flops_dense, flops_computed
    )


def _parse_tile(tile: Any) -> tuple[int, int]:
    if not isinstance(tile, list | tuple) or len(tile) != 2:
        raise TypeError(f"tile: expected (rows, columns), got {shown(tile)}")
    return integer("tile[0]", tile[0], 1), integer("tile[1]", tile[1], 1)


def tile_edges(size: int, step: int) -> npt.NDArray[np.int64]:
    """0, step, 2 * step, ..., size: tile k is [edges[k], edges[k + 1])."""
    return np.append(np.arange(0, size, step), size)


def _classify(mask: ResolvedMask, intervals: ColumnIntervals, tile: tuple[int, int]) -> npt.NDArray[np.int8]:
    """ColumnTileSummary::classify of mask.h for all tiles at once."""
    rows = tile_edges(mask.seqlen_q, tile[0])
    columns = tile_edges(mask.seqlen_k, tile[1])
    begin, end = rows[:-1, None], rows[1:, None]
    all_masked, none_masked = [], []
    for starts, ends in ((intervals.lower_start, intervals.lower_end), (intervals.upper_start, intervals.upper_end)):
        min_start, max_start = _over_tiles(np.minimum, starts, columns), _over_tiles(np.maximum, starts, columns)
        min_end, max_end = _over_tiles(np.minimum, ends, columns), _over_tiles(np.maximum, ends, columns)
        all_masked.append((max_start <= begin) & (end <= min_end))
        none_masked.append((end <= min_start) | (max_end <= begin))
    classes = np.full(all_masked[0].shape, TileClass.PARTIAL, np.int8)
    classes[none_masked[0] & none_masked[1]] = TileClass.UNMASKED
    classes[all_masked[0] | all_masked[1]] = TileClass.FULLY_MASKED
    if mask.block_visible is None:
        return classes
    visible, blocks = _blocks_in_tiles(mask.block_visible, rows, columns)
    classes = np.broadcast_to(classes, visible.shape).copy()
    classes[(visible < blocks) & (classes == TileClass.UNMASKED)] = TileClass.PARTIAL
    classes[visible == 0] = TileClass.FULLY_MASKED
    return classes


def _over_tiles(extreme: np.ufunc, bounds: Rows, columns: npt.NDArray[np.int64]) -> Rows:
    """`[b, h, s_k]` -> `[b, h, 1, column tiles]`."""
    result: Rows = extreme.reduceat(bounds, columns[:-1], axis=2)[:, :, None]
    return result


def _blocks_in_tiles(
    block_visible: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How many visible entries of block_mask, and how many in all, each tile touches."""
    sums = np.zeros((*block_visible.shape[:2], block_visible.shape[2] + 1, block_visible.shape[3] + 1), np.int64)
    sums[:, :, 1:, 1:] = block_visible.cumsum(axis=2).cumsum(axis=3)
    (row_from, row_to), (column_from, column_to) = _touched_blocks(rows), _touched_blocks(columns)

    def before(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        result: npt.NDArray[np.int64] = sums[:, :, row[:, None], column]
        return result

    visible = before(row_to, column_to) - before(row_from, column_to)
    visible += before(row_from, column_from) - before(row_to, column_from)
    return visible, np.multiply.outer(row_to - row_from, column_to - column_from)


def _touched_blocks(edges: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The range of block_mask entries that each tile touches along one axis."""
    return edges[:-1] // BLOCK, -(-edges[1:] // BLOCK)


def _visible_scores(mask: ResolvedMask, intervals: ColumnIntervals) -> int:
    """The true area of the mask, over batch and mask heads."""
    if mask.block_visible is None:
        masked = intervals.masked_rows_before(mask.seqlen_q)
        return int((mask.seqlen_q - masked).sum())
    visible = 0
    before = intervals.masked_rows_before(0)
    for block, row in enumerate(range(0, mask.seqlen_q, BLOCK)):
        end = min(row + BLOCK, mask.seqlen_q)
        after = intervals.masked_rows_before(end)
        seen = end - row - (after - before)  # rows of this block that see each column
        columns = mask.block_visible[:, :, block].repeat(BLOCK, axis=2)[..., : mask.seqlen_k]
        visible += int((seen * columns).sum())
        before = after
    return visible
