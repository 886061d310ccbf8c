"""The pictures show the mask: the cells that are drawn are compared, not only that a file appears."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tiled_mask_cases

from paddle_flashmask import masks, plotting

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

PNG = b"\x89PNG\r\n\x1a\n"


def cells(ax):
    """The values of the picture's cells."""
    (mesh,) = ax.collections
    rows, columns, _ = mesh.get_coordinates().shape  # of the corners; matplotlib before 3.8 flattens the array
    return np.asarray(mesh.get_array()).reshape(rows - 1, columns - 1)


def colours(ax):
    """RGBA of the picture's cells."""
    (mesh,) = ax.collections
    return mesh.to_rgba(cells(ax))


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def averaged(dense, rows, columns):
    """Mean of each cell, element by element."""
    return np.array(
        [[dense[i0:i1, j0:j1].mean() for j0, j1 in pairwise(columns)] for i0, i1 in pairwise(rows)],
    )


@given(tiled_mask_cases(max_batch=1, heads=(1,)), st.sampled_from([1, 7, 64, 512]), st.booleans())
@settings(max_examples=40)
def test_cells_are_exact_averages(case, size, with_blocks):
    blocks = None
    if with_blocks:
        shape = (1, 1, -(-case.seqlen_q // 128), -(-case.seqlen_k // 128))
        blocks = np.random.default_rng(case.seqlen_q).integers(0, 2, shape, np.int32)
    mask = plotting._one_mask(*case, blocks, None, 0, 0)
    shares, rows, columns = plotting.visible_fraction(mask, size)
    for edges, total in ((rows, case.seqlen_q), (columns, case.seqlen_k)):
        assert edges[0] == 0
        assert edges[-1] == total
        assert edges.size - 1 == min(total, size)
    dense = masks.to_dense(*case, block_mask=blocks)[0, 0]
    np.testing.assert_allclose(shares, averaged(dense, rows, columns), atol=1e-12)


def test_plot_mask():
    mask = masks.document([[3, 5], [1, 7]])
    ax = plotting.plot_mask(*mask, 8)
    assert (cells(ax) == masks.to_dense(*mask, 8)[0, 0]).all()
    assert ax.get_ylim() == (8, 0)  # row 0 is at the top
    assert ax.get_xlim() == (0, 8)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key column j", "query row i")
    assert ax.get_title() == f"mask: {34 / 64:.1%} of the scores visible"
    assert legend(ax) == ["visible", "masked"]
    second = plotting.plot_mask(*mask, 8, batch=1, title="second")
    assert (cells(second) == masks.to_dense(*mask, 8)[1, 0]).all()
    assert second.get_title() == "second"
    assert second.figure is not ax.figure


def test_plot_mask_colours():
    ax = plotting.plot_mask(None, True, 2)
    drawn = [[to_hex(colour).upper() for colour in row] for row in colours(ax)]
    visible, masked = plotting.VISIBLE_COLOUR, plotting.MASKED_COLOUR
    assert drawn == [[visible, masked], [visible, visible]]


def test_plot_long_mask_says_that_it_averages():
    ax = plotting.plot_mask(None, True, 1000)
    assert cells(ax).shape == (512, 512)
    assert legend(ax) == ["visible", "in part (average)", "masked"]


def test_plot_blocks():
    mask = masks.hash_sparse([[[100, 300], [250, 150]]], heads=2)
    ax = plotting.plot_blocks(*mask, 400, tile=(64, 32), head=1)
    classes = masks.block_classes(*mask, 400, tile=(64, 32))[0, 1]
    assert (cells(ax) == classes).all()
    skipped, partial, unmasked = ((classes == c).sum() for c in range(3))
    assert legend(ax) == [
        f"fully masked: skipped ({skipped})",
        f"partial: masked by element ({partial})",
        f"unmasked: computed as is ({unmasked})",
    ]
    assert ax.get_title() == f"64 x 32 tiles: {skipped / classes.size:.1%} skipped"


def test_plot_blocks_colours_follow_the_legend():
    ax = plotting.plot_blocks(*masks.causal_document([[4, 4]]), 8, tile=(2, 2))
    classes = cells(ax)
    assert set(classes.flat) == {0, 1, 2}
    for value, colour in zip(classes.flat, colours(ax).reshape(-1, 4), strict=True):
        assert to_hex(colour).upper() == plotting.CLASS_COLOURS[value]
    patches = [to_hex(patch.get_facecolor()).upper() for patch in ax.get_legend().get_patches()]
    assert patches == list(plotting.CLASS_COLOURS.values())


def test_block_mask_and_window_are_drawn():
    blocks = np.array([[[[1, 1], [0, 1]]], [[[1, 0], [0, 0]]]], np.int32)
    for batch in (0, 1):
        ax = plotting.plot_mask(None, False, 256, window_size=(200, 3), block_mask=blocks, batch=batch)
        expected = masks.to_dense(None, False, 256, window_size=(200, 3), block_mask=blocks)[batch, 0]
        assert (cells(ax) == expected).all()
        ax = plotting.plot_blocks(None, False, 256, window_size=(200, 3), block_mask=blocks, batch=batch)
        expected = masks.block_classes(None, False, 256, window_size=(200, 3), block_mask=blocks)[batch, 0]
        assert (cells(ax) == expected).all()


def test_draws_into_given_axes():
    left, right = Figure().subplots(1, 2)
    assert plotting.plot_mask(None, True, 8, ax=left) is left
    assert plotting.plot_blocks(None, True, 8, 12, ax=right) is right


def test_saves_png_and_never_overwrites_unasked(tmp_path):
    path = tmp_path / "mask.png"
    mask = masks.causal_document([[300, 200]])
    figure = plotting.plot_mask_and_blocks(*mask, 500, title="packed", path=path)
    assert figure._suptitle.get_text() == "packed"  # get_suptitle() came with matplotlib 3.8
    assert [len(ax.collections) for ax in figure.axes] == [1, 1]
    first = path.read_bytes()
    assert first.startswith(PNG)
    with pytest.raises(FileExistsError, match=r"path: .*mask.png exists; choose another name or pass overwrite=True"):
        plotting.plot_mask_and_blocks(None, True, 500, path=path)
    assert path.read_bytes() == first
    plotting.plot_mask_and_blocks(None, True, 500, path=str(path), overwrite=True)
    second = path.read_bytes()
    assert second.startswith(PNG)
    assert second != first
    with pytest.raises(FileNotFoundError):
        plotting.plot_mask_and_blocks(None, True, 500, path=tmp_path / "no" / "mask.png")


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"

    def draw(*arguments):
        path.write_text("mine")

    monkeypatch.setattr(plotting, "_draw_blocks", draw)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        plotting.plot_mask_and_blocks(None, True, 16, path=path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "mask.jpg"}, ValueError, r"path: expected a name ending in .png, got 'mask.jpg'"),
        ({"path": 3}, TypeError, "path: expected a file name, got 3"),
        ({"batch": 2}, ValueError, "batch: expected less than 2, the mask's size on that axis, got 2"),
        ({"head": 1}, ValueError, "head: expected less than 1, the mask's size on that axis, got 1"),
        ({"batch": -1}, ValueError, "batch: expected at least 0, got -1"),
        ({"head": 0.0}, TypeError, "head: expected an integer, got 0.0"),
        ({"tile": (0, 1)}, ValueError, r"tile\[0\]: expected at least 1, got 0"),
        ({"tile": 128}, TypeError, r"tile: expected \(rows, columns\), got 128"),
        ({"dpi": 0}, ValueError, "dpi: expected at least 10, got 0"),
        ({"causal": False}, ValueError, "expected 2 or 4 when causal=False, got 1"),
        ({"seqlen_q": 0}, ValueError, "seqlen_q: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(change, error, message):
    indices, causal = masks.causal_document([[3, 5], [8]])
    arguments = {"startend_row_indices": indices, "causal": causal, "seqlen_q": 8, **change}
    with pytest.raises(error, match=message):
        plotting.plot_mask_and_blocks(**arguments)


def test_long_mask_in_linear_memory():
    seqlen = 131072
    mask = masks.global_sliding_window(seqlen, 16, 8192, 8192)
    tracemalloc.start()
    begin = time.perf_counter()
    figure = plotting.plot_mask_and_blocks(*mask, seqlen)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(max(cells(ax).shape) <= plotting.MAX_CELLS for ax in figure.axes)
    assert peak < 256 * 2**20  # the dense mask is 16 GiB
    assert seconds < 20


def test_uses_no_pyplot():
    code = (
        "import sys\n"
        "from paddle_flashmask import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plotting.plot_mask_and_blocks(None, True, 64)\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(masks.__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
