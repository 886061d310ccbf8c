"""Pictures of masks and of what the kernels skip. Needs matplotlib: `pip install paddle-flashmask[plot]`.

Figures are made without pyplot, so there is no global state and no display is needed. Long masks are averaged down to
the resolution of the picture in O(s_k) memory.
"""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import masks
from .masks import TileClass
from .masks._arguments import integer, shown
from .masks._intervals import ColumnIntervals, ResolvedMask, resolve
from .masks._validate import BLOCK
from .masks.blocks import tile_edges
from .masks.windows import WindowSize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 512
"""Cells of a picture along one axis; longer masks are averaged."""

# Okabe and Ito's palette: told apart with every kind of colour blindness, and in grey by their lightness.
VISIBLE_COLOUR = "#0072B2"
MASKED_COLOUR = "#F4F4F4"
CLASS_COLOURS = {TileClass.FULLY_MASKED: "#E4E4E4", TileClass.PARTIAL: "#E69F00", TileClass.UNMASKED: "#0072B2"}
CLASS_NAMES = {
    TileClass.FULLY_MASKED: "fully masked: skipped",
    TileClass.PARTIAL: "partial: masked by element",
    TileClass.UNMASKED: "unmasked: computed as is",
}
QUERY_AXIS, KEY_AXIS = "query row i", "key column j"


def plot_mask(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block_mask: Any = None,
    window_size: WindowSize | None = None,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws who sees whom, one sample and mask head. A shade between the two colours is an average over a cell.

    Args:
        startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size: as for `masks.to_dense`.
        batch, head: which sample and mask head to draw.
        title: above the picture; None writes a plain one.
        ax: axes to draw into; None makes a figure (`result.figure`).

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: as `masks.validate`; or a sample or head that the mask does not have.
    """
    mask = _one_mask(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size, batch, head)
    return _draw_mask(mask, title, ax if ax is not None else _new_axes(mask))


def plot_blocks(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    tile: tuple[int, int] = (BLOCK, BLOCK),
    block_mask: Any = None,
    window_size: WindowSize | None = None,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the class of every tile: what is skipped, what is masked by element, what is computed as it is.

    Arguments, result and errors as `plot_mask`; `tile` is (rows, columns). Where a picture has more tiles than
    `MAX_CELLS` along an axis, a dot shows one tile of several; the counts in the legend are always of all tiles.
    """
    mask = _one_mask(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size, batch, head)
    return _draw_blocks(mask, tile, title, ax if ax is not None else _new_axes(mask))


def plot_mask_and_blocks(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    tile: tuple[int, int] = (BLOCK, BLOCK),
    block_mask: Any = None,
    window_size: WindowSize | None = None,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dpi: int = 100,
) -> Figure:
    """The mask and its block classes side by side, saved as a PNG if `path` is given.

    Args:
        startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size, batch, head: as for `plot_mask`.
        tile: rows and columns of a tile.
        title: above both pictures.
        path: a file name ending in .png; None saves nothing.
        overwrite: whether a file that is there may be replaced.
        dpi: pixels per inch; the figure is 11 inches wide.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        FileExistsError: `path` exists and `overwrite` is False.
        TypeError, ValueError: as `plot_mask`; or a `path` that does not end in .png.
    """
    mask = _one_mask(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size, batch, head)
    target = None if path is None else _png_path(path, overwrite)
    dpi = integer("dpi", dpi, 10, 1000)
    figure = _figure(11, _height(mask, 11 / 2))
    left, right = figure.subplots(1, 2)
    _draw_mask(mask, None, left)
    _draw_blocks(mask, tile, None, right)
    if title is not None:
        figure.suptitle(title)
    if target is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        try:
            # Mode "x" leaves no moment between looking and writing.
            with open(target, "wb" if overwrite else "xb") as file:
                file.write(buffer.getvalue())
        except FileExistsError:
            raise _exists(target) from None
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"paddle_flashmask.plotting needs matplotlib ({error}): pip install paddle-flashmask[plot]"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _height(mask: ResolvedMask, width: float) -> float:
    """Inches for a picture of this width, so that little of it stays empty: labels and legend take about 1.6."""
    return 1.6 + (width - 1.4) * min(max(mask.seqlen_q / mask.seqlen_k, 0.3), 1.6)


def _new_axes(mask: ResolvedMask) -> Axes:
    axes: Axes = _figure(5.5, _height(mask, 5.5)).subplots()
    return axes


def _png_path(path: str | os.PathLike[str], overwrite: bool) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a file name, got {shown(path)}")
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"path: expected a name ending in .png, got {str(target)!r}")
    if target.exists() and not overwrite:  # before the work of drawing
        raise _exists(target)
    return target


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"path: {target} exists; choose another name or pass overwrite=True")


def _one_mask(
    startend_row_indices: Any,
    causal: bool,
    seqlen_q: int,
    seqlen_k: int | None,
    block_mask: Any,
    window_size: WindowSize | None,
    batch: int,
    head: int,
) -> ResolvedMask:
    """The mask of one sample and mask head, checked: its arrays have first axes of size 1."""
    mask = resolve(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask, window_size)
    # Without indices of its own (None, a window) every sample and head has this mask.
    sizes = mask.batch_and_heads if mask.block_visible is not None or startend_row_indices is not None else None
    picked = []
    for name, value, size in zip(("batch", "head"), (batch, head), sizes or (None, None), strict=True):
        index = integer(name, value, 0)
        if size is not None and index >= size:
            raise ValueError(f"{name}: expected less than {size}, the mask's size on that axis, got {index}")
        picked.append(index)

    def pick(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        if array is None:
            return None
        b, h = (min(i, n - 1) for i, n in zip(picked, array.shape[:2], strict=True))  # a window's are of size 1
        return array[b : b + 1, h : h + 1]

    return ResolvedMask(pick(mask.indices), mask.causal, mask.seqlen_q, mask.seqlen_k, pick(mask.block_visible))


def _draw_mask(mask: ResolvedMask, title: str | None, ax: Axes) -> Axes:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    colours = LinearSegmentedColormap.from_list("visible", [MASKED_COLOUR, VISIBLE_COLOUR])
    fraction, rows, columns = visible_fraction(mask)
    visible = float((fraction * np.multiply.outer(np.diff(rows), np.diff(columns))).sum())
    _show_cells(ax, fraction, rows, columns, cmap=colours, vmin=0, vmax=1)
    share = visible / (mask.seqlen_q * mask.seqlen_k)
    _finish(ax, mask, title if title is not None else f"mask: {share:.1%} of the scores visible")
    handles = [
        Patch(facecolor=VISIBLE_COLOUR, edgecolor="0.4", label="visible"),
        Patch(facecolor=MASKED_COLOUR, edgecolor="0.4", label="masked"),
    ]
    if fraction.shape != (mask.seqlen_q, mask.seqlen_k):
        handles.insert(1, Patch(facecolor=colours(0.5), edgecolor="0.4", label="in part (average)"))
    _legend(ax, handles, columns=3)
    return ax


def _draw_blocks(mask: ResolvedMask, tile: tuple[int, int], title: str | None, ax: Axes) -> Axes:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    arguments = _arguments_of(mask)
    classes = masks.block_classes(**arguments, tile=tile)[0, 0]
    stats = masks.block_stats(**arguments, tile=tile)
    rows, columns = tile_edges(mask.seqlen_q, tile[0]), tile_edges(mask.seqlen_k, tile[1])
    grid = max(classes.shape) <= 64
    if max(classes.shape) > MAX_CELLS:
        picked = [np.unique(np.linspace(0, n - 1, min(n, MAX_CELLS)).astype(int)) for n in classes.shape]
        classes = classes[np.ix_(*picked)]
        rows, columns = np.append(rows[picked[0]], rows[-1]), np.append(columns[picked[1]], columns[-1])
    colours = ListedColormap([CLASS_COLOURS[c] for c in TileClass])
    _show_cells(ax, classes, rows, columns, cmap=colours, vmin=-0.5, vmax=2.5, edgecolors="white" if grid else "none")
    share = stats.total.fully_masked / stats.total.total
    name = f"{tile[0]} x {tile[1]} tiles"
    _finish(ax, mask, title if title is not None else f"{name}: {share:.1%} skipped")
    counts = (stats.total.fully_masked, stats.total.partial, stats.total.unmasked)
    handles = [
        Patch(facecolor=CLASS_COLOURS[c], edgecolor="0.4", label=f"{CLASS_NAMES[c]} ({count:,})")
        for c, count in zip(TileClass, counts, strict=True)
    ]
    _legend(ax, handles, columns=1)
    return ax


def _arguments_of(mask: ResolvedMask) -> dict[str, Any]:
    blocks = None if mask.block_visible is None else mask.block_visible.astype(np.int32)
    return {
        "startend_row_indices": mask.indices,
        "causal": mask.causal,
        "seqlen_q": mask.seqlen_q,
        "seqlen_k": mask.seqlen_k,
        "block_mask": blocks,
    }


def _show_cells(
    ax: Axes, values: npt.NDArray[Any], rows: npt.NDArray[Any], columns: npt.NDArray[Any], **style: Any
) -> None:
    """Cells whose edges are given in rows and columns of the score matrix, row 0 at the top."""
    ax.pcolormesh(columns, rows, values, linewidth=0.4, rasterized=True, **style)
    ax.set_xlim(columns[0], columns[-1])
    ax.set_ylim(rows[-1], rows[0])


def _finish(ax: Axes, mask: ResolvedMask, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(title, fontsize=11)
    ax.set_xlabel(KEY_AXIS)
    ax.set_ylabel(QUERY_AXIS)
    ratio = mask.seqlen_q / mask.seqlen_k
    ax.set_aspect("equal" if 0.2 <= ratio <= 5 else "auto")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 4, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend(ax: Axes, handles: list[Any], columns: int) -> None:
    from matplotlib.transforms import ScaledTranslation

    below_labels = ScaledTranslation(0, -38 / 72, ax.figure.dpi_scale_trans)  # points, whatever the axes' height
    ax.legend(
        handles=handles,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + below_labels,
        borderaxespad=0,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )


def visible_fraction(
    mask: ResolvedMask, cells: int = MAX_CELLS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The visible share of each cell of a grid of at most `cells` x `cells`, exact, in O(s_k + cells^2) memory.

    Returns the shares and the edges of the cells' rows and columns.
    """
    rows, columns = (
        np.unique(np.linspace(0, size, min(size, cells) + 1).round().astype(np.int64))
        for size in (mask.seqlen_q, mask.seqlen_k)
    )
    steps = rows
    if mask.block_visible is not None:  # stop where block_mask changes, too
        steps = np.unique(np.concatenate([rows, np.arange(0, mask.seqlen_q, BLOCK)]))
    counts = np.zeros((rows.size - 1, columns.size - 1))
    intervals: ColumnIntervals = mask.intervals()
    before = intervals.masked_rows_before(0)
    for begin, end in pairwise(steps):
        after = intervals.masked_rows_before(int(end))
        seen = (int(end - begin) - (after - before))[0, 0]  # how many of these rows see each column
        if mask.block_visible is not None:
            seen = seen * mask.block_visible[0, 0, begin // BLOCK].repeat(BLOCK)[: mask.seqlen_k]
        cell = int(np.searchsorted(rows, begin, side="right")) - 1
        counts[cell] += np.add.reduceat(seen, columns[:-1])
        before = after
    return counts / np.multiply.outer(np.diff(rows), np.diff(columns)), rows, columns
