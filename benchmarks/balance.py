"""How evenly a queue of row tiles spreads over the multiprocessors of an H100: computed, not measured on a device.

    python benchmarks/balance.py --seqlens 8192,32768

A row tile costs its visible column tiles and a fixed share; every multiprocessor takes the next one when it is done, as
the persistent forward kernel does. `now` is the kernel's order (heads in groups that share the L2 cache, last rows
first), `heaviest` sorts each group by cost. Both are the busiest multiprocessor's work over the mean.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workloads import MASKS, Case
from paddle_flashmask import masks

MULTIPROCESSORS = 132
CACHE_BYTES = 20 << 20  # cuda_backend.cu: keys and values of the heads that run together
FIXED_COST = 0.6  # of a row tile, in column tiles: start, epilogue
COLUMNS = 128


def visible_tiles(case: Case, rows: int) -> npt.NDArray[np.int64]:
    """Column tiles that each row tile sees, `[batch, row tiles]`."""
    indices, causal = case.indices()
    classes = masks.block_classes(indices, causal, case.seqlen, tile=(rows, COLUMNS))
    visible = (classes != masks.TileClass.FULLY_MASKED).sum(-1)
    return np.broadcast_to(visible[:, 0], (case.batch, visible.shape[-1]))


def imbalance(costs: list[float]) -> float:
    """Largest over mean work when each worker takes the next piece as soon as it is free."""
    workers = [0.0] * MULTIPROCESSORS
    for cost in costs:
        heapq.heapreplace(workers, workers[0] + cost)
    return max(workers) / (sum(costs) / MULTIPROCESSORS)


def orders(case: Case, rows: int) -> tuple[list[float], list[float]]:
    costs = visible_tiles(case, rows) + FIXED_COST
    heads = case.batch * case.heads
    together = max(1, min(heads, CACHE_BYTES // (case.seqlen * case.head_dim * 4)))
    now: list[float] = []
    heaviest: list[float] = []
    for first in range(0, heads, together):
        group = range(first, min(first + together, heads))
        items = [float(costs[head // case.heads, row]) for row in range(costs.shape[1] - 1, -1, -1) for head in group]
        now += items
        heaviest += sorted(items, reverse=True)
    return now, heaviest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", default="8192,32768,131072")
    parser.add_argument("--tokens", type=int, default=131072)
    arguments = parser.parse_args()
    table = Table("seqlen", "head dim", "mask", "row tiles per multiprocessor", "now", "heaviest")
    for seqlen in map(int, arguments.seqlens.split(",")):
        for head_dim, rows in ((64, 192), (128, 128)):
            for mask in MASKS:
                batch = max(1, arguments.tokens // seqlen)
                case = Case(mask, seqlen, head_dim, 4096 // head_dim, batch, "bfloat16")
                now, heaviest = orders(case, rows)
                share = f"{len(now) / MULTIPROCESSORS:.0f}"
                row = (f"{imbalance(now):.3f}", f"{imbalance(heaviest):.3f}")
                table.add_row(str(seqlen), str(head_dim), mask, share, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
