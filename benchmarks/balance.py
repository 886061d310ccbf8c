"""How evenly the tiles of a call spread over the multiprocessors of an H100: computed, not measured on a device.

    python benchmarks/balance.py --tokens 8192,131072 --seqlens 8192

A row tile of the forward pass costs its visible column tiles and a fixed share, a column tile of the backward pass its
visible row tiles and another; every multiprocessor takes the next one when it is done, as the persistent kernels do.
Printed is the busiest multiprocessor's work over the mean, in the kernels' order of heads and tiles (head_groups.h)
and, in brackets, if all groups of heads were alike. Rows that the backward pass prepares and finishes are left out.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workloads import MASKS, Case
from paddle_flashmask import masks

MULTIPROCESSORS = 132
CACHE_BYTES, LAST_BYTES = 20 << 20, 48 << 20  # cuda_backend.cu: what heads of a group take, and of the last group


@dataclass(frozen=True)
class Direction:
    """What decides about the order of one kernel's tiles."""

    tiles: dict[int, tuple[int, int]]  # rows and columns, by head dim
    unmasked_tiles: dict[int, tuple[int, int]]  # where nothing masks
    fixed_cost: float  # of a piece of work, in tiles: its beginning and end
    rows_of_last_group: int  # head_groups.h
    smallest_share: int  # the last group has at most one head in so many
    group_tiles: int | None  # a group needs no more heads than have so many pieces of work

    def bytes_per_head(self, case: Case) -> int:
        per_row = 4 * case.head_dim  # K and V
        return case.seqlen * (per_row if self.group_tiles is None else 2 * per_row)  # or Q, dO and the sums of dQ

    def costs(self, case: Case) -> npt.NDArray[np.float64]:
        """Of a head's pieces of work in their order, `[batch, pieces]`."""
        indices, causal = case.indices()
        tiles = self.unmasked_tiles if case.mask == "full" else self.tiles
        classes = masks.block_classes(indices, causal, case.seqlen, tile=tiles[case.head_dim])
        seen = (classes != masks.TileClass.FULLY_MASKED)[:, 0]
        if self.group_tiles is not None:
            counts = seen.sum(-2)
        else:
            rows = np.arange(seen.shape[-2])[::-1]
            counts = seen.sum(-1)[:, np.concatenate((rows[:1], rows[-1:], rows[1:-1]))[: len(rows)]]
        return np.broadcast_to(counts, (case.batch, counts.shape[-1])) + self.fixed_cost

    def groups(self, case: Case, pieces: int, last_larger: bool) -> Iterable[range]:
        heads, size = case.batch * case.heads, self.bytes_per_head(case)
        each = max(1, min(heads, CACHE_BYTES // size))
        if self.group_tiles is not None:
            each = min(each, -(-self.group_tiles // pieces))
        of_last = each
        if last_larger and case.mask != "full":
            wanted = (-(-self.rows_of_last_group // case.seqlen), max(2, LAST_BYTES // size))
            of_last = max(each, min(*wanted, -(-heads // self.smallest_share)))
        last = -(-max(0, heads - of_last) // each) * each
        yield from (range(first, first + each) for first in range(0, last, each))
        yield range(last, heads)

    def imbalance(self, case: Case, last_larger: bool) -> float:
        """Largest over mean work when each worker takes the next piece as soon as it is free."""
        costs = self.costs(case)
        workers = [0.0] * MULTIPROCESSORS
        for group in self.groups(case, costs.shape[1], last_larger):
            for piece in range(costs.shape[1]):
                for head in group:
                    heapq.heapreplace(workers, workers[0] + float(costs[head // case.heads, piece]))
        return max(workers) * MULTIPROCESSORS / (costs.sum() * case.heads)


# sm90/forward_config.h, sm90/backward_config.cuh and head_groups.h; tests/test_benchmark_balance.py compares.
FORWARD = Direction({64: (256, 128), 128: (192, 64)}, {64: (192, 128), 128: (192, 64)}, 0.6, 128 << 10, 1, None)
BACKWARD_TILES = {64: (128, 128), 128: (64, 128)}
BACKWARD = Direction(BACKWARD_TILES, BACKWARD_TILES, 1.0, 64 << 10, 3, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", default="8192,32768,131072")
    parser.add_argument("--tokens", default="8192,131072", help="batch * seqlen; heads * head_dim is 4096")
    arguments = parser.parse_args()
    table = Table("tokens", "seqlen", "head dim", "mask", "forward", "backward")
    for tokens in map(int, arguments.tokens.split(",")):
        for seqlen in map(int, arguments.seqlens.split(",")):
            if seqlen > tokens:
                continue
            for head_dim in (64, 128):
                for mask in MASKS:
                    case = Case(mask, seqlen, head_dim, 4096 // head_dim, tokens // seqlen, "bfloat16")
                    found = (
                        f"{direction.imbalance(case, True):.3f} ({direction.imbalance(case, False):.3f})"
                        for direction in (FORWARD, BACKWARD)
                    )
                    table.add_row(str(tokens), str(seqlen), str(head_dim), mask, *found)
    Console().print(table)


if __name__ == "__main__":
    main()
