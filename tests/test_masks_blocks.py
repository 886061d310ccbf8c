"""Block classes: exact in the direction that matters, equal to mask.h, and cheap at 131,072 tokens."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tiled_mask_cases

from paddle_flashmask import masks
from paddle_flashmask.masks import TileClass

TILES = st.sampled_from([(1, 1), (4, 1), (3, 5), (16, 16), (64, 32), (128, 128), (500, 7)])


def tiles_of(dense, tile):
    """(row tile, column tile, the part of `dense` [b, h, s_q, s_k] in it)."""
    for r, i in enumerate(range(0, dense.shape[2], tile[0])):
        for c, j in enumerate(range(0, dense.shape[3], tile[1])):
            yield r, c, dense[:, :, i : i + tile[0], j : j + tile[1]]


def check_direction(classes, dense, tile):
    counted = 0
    for r, c, part in tiles_of(dense, tile):
        seen = part.any(axis=(2, 3))
        free = part.all(axis=(2, 3))
        judged = classes[:, :, r, c]
        assert not (seen & (judged == TileClass.FULLY_MASKED)).any(), (r, c)
        assert not (~free & (judged == TileClass.UNMASKED)).any(), (r, c)
        counted += judged.size
    assert counted == classes.size


@given(tiled_mask_cases(), TILES)
@settings(max_examples=60)
def test_no_visible_element_is_skipped(case, tile):
    if tile[1] == 1:  # fewer of them, the test loops over tiles
        indices = case.indices[:, :, :20]
        case = case._replace(indices=indices, seqlen_q=min(case.seqlen_q, 30), seqlen_k=indices.shape[2])
    classes = masks.block_classes(*case, tile=tile)
    dense = masks.to_dense(*case)
    check_direction(classes, dense, tile)
    if tile[1] == 1:  # one column's bounds are exact
        for r, c, part in tiles_of(dense, tile):
            assert (part.all(axis=(2, 3)) == (classes[:, :, r, c] == TileClass.UNMASKED)).all()


@given(tiled_mask_cases(max_seqlen=300), TILES, st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_block_mask_in_tiles_of_any_size(case, tile, seed):
    tile = (max(tile[0], 5), max(tile[1], 5))
    shape = (*case.indices.shape[:2], -(-case.seqlen_q // 128), -(-case.seqlen_k // 128))
    blocks = np.random.default_rng(seed).integers(0, 2, shape, np.int32)
    classes = masks.block_classes(*case, tile=tile, block_mask=blocks)
    dense = masks.to_dense(*case, block_mask=blocks)
    check_direction(classes, dense, tile)
    # What block_mask hides whole is skipped.
    hidden = np.ones_like(dense) & ~masks.to_dense(None, False, *dense.shape[2:], block_mask=blocks)
    for r, c, part in tiles_of(hidden, tile):
        assert (classes[:, :, r, c][part.all(axis=(2, 3))] == TileClass.FULLY_MASKED).all()
    stats = masks.block_stats(*case, tile=tile, block_mask=blocks)
    assert stats.visible_fraction == pytest.approx(dense.mean(), abs=1e-12)


@pytest.mark.parametrize(
    "mask",
    {
        "causal": masks.causal(),
        "documents": masks.causal_document([[128, 256, 128]]),
        "bidirectional": masks.document([[128, 256, 128]]),
        "global window": masks.global_sliding_window(512, 64, 128, 64),
        "padding": masks.causal_document([[128, 128]], seqlen=512),
    }.values(),
)
def test_builders_tiles_are_exact(mask):
    """On masks whose edges fit the tiles, every tile that could be skipped or left unmasked is."""
    tile = (64, 64)
    classes = masks.block_classes(*mask, 512, tile=tile)
    for r, c, part in tiles_of(masks.to_dense(*mask, 512), tile):
        expected = TileClass.UNMASKED if part.all() else TileClass.PARTIAL if part.any() else TileClass.FULLY_MASKED
        assert classes[0, 0, r, c] == expected, (r, c)


def test_dead_columns_and_empty_intervals_spoil_nothing():
    indices, causal = masks.causal_document([[128, 128]])
    indices[0, 0, 60:70] = 0  # no row sees these columns
    classes = masks.block_classes(indices, causal, 256, tile=(64, 64))
    assert classes[0, 0, 2, 0] == TileClass.FULLY_MASKED
    assert classes[0, 0, 3, 1] == TileClass.FULLY_MASKED
    indices = np.full((1, 1, 256, 4), 0, np.int32)
    indices[..., 0], indices[..., 1] = 0, 256
    indices[0, 0, 1] = [9, 3, 0, 256]  # the same column, said with the other interval
    indices[0, 0, 2] = [0, 128, 128, 256]  # and with both
    assert (masks.block_classes(indices, False, 256, tile=(64, 64)) == TileClass.FULLY_MASKED).all()
    indices = np.full((1, 1, 256, 2), 256, np.int32)
    indices[..., 1] = 0
    indices[0, 0, ::2] = [300, -5]  # nothing masked, in other words
    assert (masks.block_classes(indices, False, 256, tile=(64, 64)) == TileClass.UNMASKED).all()


HARNESS = """
#include "mask.h"
using namespace flashmask;
extern "C" void classify(const int32_t* bounds, int32_t n, int32_t causal, int32_t heads, int32_t s_q, int32_t s_k,
                         int32_t tile_rows, int32_t tile_columns, int8_t* classes, int8_t* masked) {
  for (int32_t h = 0; h < heads; ++h) {
    const int32_t* head = bounds + static_cast<int64_t>(h) * s_k * n;
    const int32_t row_tiles = (s_q + tile_rows - 1) / tile_rows, column_tiles = (s_k + tile_columns - 1) / tile_columns;
    for (int32_t c = 0; c < column_tiles; ++c) {
      ColumnTileSummary summary;
      for (int32_t j = c * tile_columns; j < s_k && j < (c + 1) * tile_columns; ++j) {
        const ColumnMask mask = column_mask(head + static_cast<int64_t>(j) * n, n, causal, j, s_q, s_k);
        summary.add(mask);
        for (int32_t i = 0; i < s_q; ++i) masked[(static_cast<int64_t>(h) * s_q + i) * s_k + j] = mask.masks(i);
      }
      for (int32_t r = 0; r < row_tiles; ++r) {
        const int32_t end = (r + 1) * tile_rows < s_q ? (r + 1) * tile_rows : s_q;
        classes[(static_cast<int64_t>(h) * row_tiles + r) * column_tiles + c] =
            static_cast<int8_t>(summary.classify(r * tile_rows, end));
      }
    }
  }
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """mask.h, compiled for ctypes."""
    folder = Path(__file__).resolve().parents[1] / "custom_ops" / "flashmask"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not (folder / "mask.h").exists():
        pytest.skip("needs a C++ compiler and the source tree")
    source = tmp_path_factory.mktemp("mask") / "harness.cc"
    source.write_text(HARNESS)
    library = source.with_suffix(".so")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{folder}", source, "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


@given(case=tiled_mask_cases(), tile=TILES)
@settings(max_examples=150)
def test_equal_to_the_kernels_header(header, case, tile):
    indices = np.ascontiguousarray(case.indices)
    b, h, s_k, n = indices.shape
    classes = masks.block_classes(*case, tile=tile)
    theirs, masked = np.full(classes.shape, -1, np.int8), np.full((b, h, case.seqlen_q, s_k), -1, np.int8)
    header.classify(
        indices.ctypes.data_as(ctypes.c_void_p),
        *(ctypes.c_int32(x) for x in (n, case.causal, b * h, case.seqlen_q, s_k, *tile)),
        theirs.ctypes.data_as(ctypes.c_void_p),
        masked.ctypes.data_as(ctypes.c_void_p),
    )
    assert (classes == theirs).all()
    assert (masks.to_dense(*case) == (masked == 0)).all()


# ---- statistics ----


@given(tiled_mask_cases(), TILES)
@settings(max_examples=40)
def test_stats_count_what_is_there(case, tile):
    tile = (max(tile[0], 3), tile[1])
    stats = masks.block_stats(*case, tile=tile, head_dim=8, heads_q=2 * case.indices.shape[1])
    classes, dense = masks.block_classes(*case, tile=tile), masks.to_dense(*case)
    for h, counts in enumerate(stats.per_head):
        for value, count in zip(TileClass, (counts.fully_masked, counts.partial, counts.unmasked), strict=True):
            assert count == (classes[:, h] == value).sum()
    assert stats.total.total == classes.size
    assert stats.total.computed == (classes != TileClass.FULLY_MASKED).sum()
    assert stats.visible_fraction == pytest.approx(dense.mean(), abs=1e-12)
    computed = sum(
        part[b, h].size
        for r, c, part in tiles_of(dense, tile)
        for b, h in np.ndindex(dense.shape[:2])
        if classes[b, h, r, c] != TileClass.FULLY_MASKED
    )
    assert stats.tile_fraction == computed / dense.size
    assert stats.flops_dense == 2 * 4 * 8 * dense.size
    assert stats.flops_computed == 2 * 4 * 8 * computed
    assert stats.flops_skipped == stats.flops_dense - stats.flops_computed


def test_stats_of_plain_causal_by_hand():
    stats = masks.block_stats(None, True, 512, batch=3, heads_q=4, head_dim=64)
    assert stats.total == masks.TileCounts(fully_masked=6, partial=4, unmasked=6)
    assert stats.per_head == (stats.total,)
    assert stats.tile_fraction == 10 / 16
    assert stats.visible_fraction == (512 * 513 // 2) / 512**2
    assert stats.flops_dense == 3 * 4 * 4 * 64 * 512**2
    assert stats.flops_skipped == 3 * 4 * 4 * 64 * 6 * 128**2
    assert masks.block_stats(None, True, 512).flops_dense is None
    assert masks.block_stats(None, True, 512).flops_skipped is None
    window = masks.block_stats(None, False, 512, window_size=(128, 0))
    assert window == masks.block_stats(*masks.sliding_window(512, 129), 512)
    with pytest.raises(AttributeError):
        stats.tile = (1, 1)


@pytest.mark.parametrize(
    ("tile", "error", "message"),
    [
        (128, TypeError, r"tile: expected \(rows, columns\), got 128"),
        ((128,), TypeError, r"tile: expected \(rows, columns\), got \(128,\)"),
        ((0, 128), ValueError, r"tile\[0\]: expected at least 1, got 0"),
        ((128, 1.5), TypeError, r"tile\[1\]: expected an integer, got 1.5"),
    ],
)
def test_bad_tiles(tile, error, message):
    with pytest.raises(error, match=message):
        masks.block_classes(None, True, 256, tile=tile)
    with pytest.raises(error, match=message):
        masks.block_stats(None, True, 256, tile=tile)


@pytest.mark.parametrize("name", ["batch", "heads_q", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_sizes_of_statistics(name, value):
    expected = "at least 1" if value in (0, -1) else "an integer"
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected {expected}, got {value}"):
        masks.block_stats(None, True, 256, **{name: value})


def test_bad_statistics_arguments():
    with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
        masks.block_stats(None, True, 256, head_dim=0)
    with pytest.raises(ValueError, match=r"shape\[1\]: expected 1 or heads_q = 4, got 3"):
        masks.block_stats(np.zeros((1, 3, 8, 1), np.int32), True, 8, heads_q=4)
    with pytest.raises(ValueError, match=r"shape\[0\]: expected the batch size = 2, got 1"):
        masks.block_stats(np.zeros((1, 3, 8, 1), np.int32), True, 8, batch=2)


def test_long_sequences_take_linear_memory():
    seqlen = 131072
    blocks = np.random.default_rng(0).integers(0, 2, (1, 1, 1024, 1024), np.int32)
    mask = masks.global_sliding_window(seqlen, 16, 8192, 8192)
    tracemalloc.start()
    begin = time.perf_counter()
    plain = masks.block_stats(*mask, seqlen, head_dim=128)
    thinned = masks.block_stats(*mask, seqlen, block_mask=blocks)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 * 2**20  # the dense mask is 16 GiB
    assert seconds < 20
    assert plain.total.total == 1024**2
    assert 0.45 < thinned.visible_fraction / plain.visible_fraction < 0.55
