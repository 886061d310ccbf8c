"""In which order CUDA kernels hand out heads, tiles and rows (custom_ops/flashmask/cuda: head_groups.h, work_order.h),
compiled by g++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

FLASHMASK = Path(__file__).parents[1] / "custom_ops" / "flashmask"
SOURCE = """
#include "cuda/work_order.h"
extern "C" void list_groups(const int64_t* sizes, int64_t first, int64_t count, int32_t* begin, int32_t* heads) {
  const auto groups = flashmask::make_head_groups(sizes[2], sizes[3], sizes[4]);
  for (int64_t i = 0; i < count; ++i) {
    const auto group = flashmask::group_of(groups, static_cast<int32_t>(sizes[2]), static_cast<int32_t>(sizes[0]),
                                           static_cast<int32_t>(first + i));
    begin[i] = group.first;
    heads[i] = group.heads;
  }
}
extern "C" void list_work(const int64_t* sizes, int64_t first, int64_t count, int32_t* is_column, int32_t* number) {
  const auto groups = flashmask::make_head_groups(sizes[2], sizes[3], sizes[4]);
  const auto order = flashmask::make_work_order(sizes[0], sizes[1], sizes[2], groups, sizes[5]);
  for (int64_t i = 0; i < count; ++i) {
    const auto work = flashmask::in_order(order, static_cast<int32_t>(first + i));
    is_column[i] = work.is_column;
    number[i] = work.number;
  }
}
extern "C" void list_row_tiles(const int64_t* sizes, int64_t first, int64_t count, int32_t* tile, int32_t*) {
  for (int64_t i = 0; i < count; ++i) {
    tile[i] = flashmask::row_tile_in_order(static_cast<int32_t>(sizes[0]), static_cast<int32_t>(first + i));
  }
}
"""


class Sizes(NamedTuple):
    columns: int  # of a head
    rows: int  # of a head
    heads: int
    each: int  # heads of a group
    of_last: int  # and of the last one, at most
    spare: int = 0  # rows

    @property
    def total(self) -> int:
        return (self.columns + self.rows) * self.heads


Numbers = npt.NDArray[np.int32]
List = Callable[[str, Sizes, int, int], tuple[Numbers, Numbers]]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> List:
    """What a function of the C++ code says of numbers from one on."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("order_of_work")
    (folder / "order.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{FLASHMASK}", "order.cpp", "-o", "order.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "order.so"))

    def get(what: str, sizes: Sizes, first: int, count: int) -> tuple[Numbers, Numbers]:
        results = np.empty(count, np.int32), np.empty(count, np.int32)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in results)
        getattr(library, what)((ctypes.c_int64 * 6)(*sizes), ctypes.c_int64(first), ctypes.c_int64(count), *pointers)
        return results

    return get


def random_sizes(seed: int) -> Sizes:
    rng = np.random.default_rng(seed)
    columns, rows, heads, of_last = (int(x) for x in rng.integers((1, 0, 1, 0), (100, 100, 20, 25)))
    return Sizes(columns, rows, heads, int(rng.integers(1, heads + 1)), of_last, int(rng.integers(0, 300)))


def ends_of_groups(listed: List, sizes: Sizes) -> Numbers:
    """Of every column: the head after its group."""
    first, heads = listed("list_groups", sizes, 0, sizes.columns * sizes.heads)
    return first + heads


@pytest.mark.parametrize("seed", range(100))
def test_groups_have_every_head_once_and_the_last_is_larger(seed: int, listed: List) -> None:
    sizes = random_sizes(seed)
    first, heads = listed("list_groups", sizes, 0, sizes.columns * sizes.heads)
    begins, lengths = zip(*dict.fromkeys(zip(first.tolist(), heads.tolist(), strict=True)), strict=True)
    assert list(begins) == np.cumsum((0, *lengths[:-1])).tolist()
    assert sum(lengths) == sizes.heads
    assert set(lengths[:-1]) <= {sizes.each}
    of_last = min(sizes.heads, max(sizes.each, sizes.of_last))
    assert of_last - sizes.each < lengths[-1] <= of_last
    np.testing.assert_array_equal(first, np.repeat(begins, np.multiply(lengths, sizes.columns)))


@pytest.mark.parametrize("seed", range(200))
def test_all_work_once_and_rows_before_their_columns(seed: int, listed: List) -> None:
    sizes = random_sizes(seed)
    is_column, number = listed("list_work", sizes, 0, sizes.total + 200)
    is_column = is_column != 0
    for kind, count in ((is_column, sizes.columns * sizes.heads), (~is_column, sizes.rows * sizes.heads)):
        np.testing.assert_array_equal(number[: sizes.total][kind[: sizes.total]], np.arange(count))
    assert is_column[sizes.total :].all()
    assert (number[sizes.total :] >= sizes.columns * sizes.heads).all()
    rows_before = np.cumsum(~is_column)[: sizes.total][is_column[: sizes.total]]
    assert (rows_before >= ends_of_groups(listed, sizes) * sizes.rows).all()


def test_rows_are_spread_evenly(listed: List) -> None:
    sizes = Sizes(64, 32, 128, 2, 2, 66)
    is_column = listed("list_work", sizes, 0, sizes.total)[0] != 0
    ahead = 2 * 32 + 66
    assert not is_column[:ahead].any()
    spread = is_column[ahead : ahead + (128 * 32 - ahead) * 3]
    in_window = np.convolve(spread, np.ones(30), "valid")  # of any 30 tickets, 20 are columns, give or take one
    assert np.abs(in_window - 20).max() <= 1
    assert is_column[ahead + len(spread) :].all()


def test_rows_of_a_large_last_group_are_spread_over_all_before(listed: List) -> None:
    sizes = Sizes(64, 32, 128, 2, 28, 66)
    is_column = listed("list_work", sizes, 0, sizes.total)[0] != 0
    ahead, before_last = 2 * 32 + 66, 100 * 64
    spread = is_column[ahead : ahead + before_last + 128 * 32 - ahead]
    assert is_column[ahead + len(spread) :].all()
    columns = before_last / len(spread) * 300  # of any 300 tickets
    assert np.abs(np.convolve(spread, np.ones(300), "valid") - columns).max() <= 1.01


@pytest.mark.parametrize("of_last", [0, 16])
def test_as_many_as_numbers_have_room_for(of_last: int, listed: List) -> None:
    """A million tokens, 2,048 heads; and where the kernel's 32-bit numbers end."""
    for shape in ((8192, 4096, 2048, 1), (131072, 65536, 10000, 1), (8192, 32768, 256, 3)):
        sizes = Sizes(*shape, of_last, 600 if shape[-1] == 3 else 66)
        ahead = sizes.each * sizes.rows + sizes.spare
        for first in (0, ahead - 5, sizes.total // 2, sizes.total - 2 * ahead, sizes.total - 1000):
            is_column, number = listed("list_work", sizes, first, 1000)
            is_column = is_column != 0
            for kind in (is_column, ~is_column):
                assert (np.diff(number[kind]) == 1).all()
            assert (number < np.where(is_column, sizes.columns * sizes.heads, sizes.rows * sizes.heads)).all()
            assert (number >= 0).all()
            if is_column.any() and not is_column.all():
                begin, heads = listed("list_groups", sizes, int(number[is_column][0]), 1)
                rows_before = number[~is_column][0] + (~is_column)[: np.argmax(is_column)].sum()
                assert rows_before >= int(begin[0] + heads[0]) * sizes.rows
        last_column, last = listed("list_work", sizes, sizes.total - 1, 1)
        assert last_column[0]
        assert last[0] == sizes.columns * sizes.heads - 1


def test_row_tiles_come_once_the_last_first_and_then_the_first(listed: List) -> None:
    for count in range(1, 40):
        order = listed("list_row_tiles", Sizes(count, 0, 0, 0, 0), 0, count)[0].tolist()
        assert sorted(order) == list(range(count))
        assert order[0] == count - 1
        assert order[1:] == [0, *range(count - 2, 0, -1)][: count - 1]
