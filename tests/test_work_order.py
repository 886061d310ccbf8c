"""The order of work of the persistent backward kernel (custom_ops/flashmask/cuda/work_order.h), compiled by g++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

FLASHMASK = Path(__file__).parents[1] / "custom_ops" / "flashmask"
SOURCE = """
#include "cuda/work_order.h"
extern "C" void list_work(const int64_t* sizes, int64_t first, int64_t count, int32_t* is_column, int32_t* number) {
  const auto order = flashmask::make_work_order(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  for (int64_t i = 0; i < count; ++i) {
    const auto work = flashmask::in_order(order, static_cast<int32_t>(first + i));
    is_column[i] = work.is_column;
    number[i] = work.number;
  }
}
"""
# columns and rows of a head, heads, heads of a group, spare rows
Sizes = tuple[int, int, int, int, int]
List = Callable[[Sizes, int, int], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def list_work(tmp_path_factory: pytest.TempPathFactory) -> List:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("work_order")
    (folder / "order.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{FLASHMASK}", "order.cpp", "-o", "order.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "order.so"))

    def get(sizes: Sizes, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        is_column, number = np.empty(count, np.int32), np.empty(count, np.int32)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (is_column, number))
        library.list_work((ctypes.c_int64 * 5)(*sizes), ctypes.c_int64(first), ctypes.c_int64(count), *pointers)
        return is_column != 0, number

    return get


def random_sizes(rng: np.random.Generator) -> Sizes:
    columns, rows, heads = (int(x) for x in rng.integers((1, 0, 1), (100, 100, 20)))
    return columns, rows, heads, int(rng.integers(1, heads + 1)), int(rng.integers(0, 300))


@pytest.mark.parametrize("seed", range(100))
def test_all_work_once_and_rows_before_their_columns(seed: int, list_work: List) -> None:
    sizes = random_sizes(np.random.default_rng(seed))
    columns, rows, heads, group, _ = sizes
    total = (columns + rows) * heads
    is_column, number = list_work(sizes, 0, total + 200)
    for kind, count in ((is_column, columns * heads), (~is_column, rows * heads)):
        np.testing.assert_array_equal(number[:total][kind[:total]], np.arange(count))
    assert is_column[total:].all()
    assert (number[total:] >= columns * heads).all()
    rows_before = np.cumsum(~is_column)[:total][is_column[:total]]
    groups = np.arange(columns * heads) // (columns * group)
    assert (rows_before >= np.minimum((groups + 1) * group, heads) * rows).all()


def test_rows_are_spread_evenly(list_work: List) -> None:
    sizes = (64, 32, 128, 2, 66)
    is_column, _ = list_work(sizes, 0, 96 * 128)
    ahead = 2 * 32 + 66
    assert not is_column[:ahead].any()
    spread = is_column[ahead : ahead + (128 * 32 - ahead) * 3]
    in_window = np.convolve(spread, np.ones(30), "valid")  # of any 30 tickets, 20 are columns, give or take one
    assert np.abs(in_window - 20).max() <= 1
    assert is_column[ahead + len(spread) :].all()


def test_as_many_as_numbers_have_room_for(list_work: List) -> None:
    """A million tokens, 2,048 heads; and where the kernel's 32-bit numbers end."""
    for sizes in ((8192, 4096, 2048, 1, 66), (131072, 65536, 10000, 1, 66), (8192, 32768, 256, 3, 600)):
        columns, rows, heads, group, spare = sizes
        total = (columns + rows) * heads
        ahead = group * rows + spare
        for first in (0, ahead - 5, total // 2, total - 2 * ahead, total - 1000):
            is_column, number = list_work(sizes, first, 1000)
            for kind in (is_column, ~is_column):
                assert (np.diff(number[kind]) == 1).all()
            assert (number < np.where(is_column, columns * heads, rows * heads)).all()
            assert (number >= 0).all()
            if is_column.any() and not is_column.all():
                column = number[is_column][0]
                rows_before = number[~is_column][0] + (~is_column)[: np.argmax(is_column)].sum()
                assert rows_before >= (column // (columns * group) + 1) * group * rows
        last_column, last = list_work(sizes, total - 1, 1)
        assert last_column[0]
        assert last[0] == columns * heads - 1
