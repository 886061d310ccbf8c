"""How evenly `paddle_flashmask.distributed` spreads a mask over workers: computed, not measured.

    python benchmarks/context_balance.py --workers 2,8

A worker's work is how many scores its rows see. Printed is that of the busiest worker over the mean: on average over
the five samples of documents in benchmarks/workloads.json, the largest of them and, in brackets, on average if every
worker had neighbouring chunks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workloads import MASKS, Case
from paddle_flashmask.masks._form import Mask
from paddle_flashmask.masks._intervals import column_intervals

SAMPLES = 5


def seen_by_chunks(mask: Mask, seqlen: int, chunks: int) -> npt.NDArray[np.int64]:
    """Visible scores of each of equally many rows: `[batch or 1, chunks]`."""
    intervals = column_intervals(*mask, seqlen, seqlen)
    ends = range(0, seqlen + 1, seqlen // chunks)
    seen = [seqlen * end - intervals.masked_rows_before(end).sum(axis=(1, 2)) for end in ends]
    return np.diff(np.stack(seen, axis=1), axis=1)


def busiest(chunks: npt.NDArray[np.int64], workers: int, neighbouring: bool) -> npt.NDArray[np.float64]:
    """The most that a worker has over the mean, for each sample."""
    if neighbouring:
        work = chunks.reshape(-1, workers, 2).sum(axis=2)
    else:
        work = chunks[:, :workers] + chunks[:, : workers - 1 : -1]  # chunk r and the r-th from behind
    return np.asarray(work.max(axis=1) / work.mean(axis=1))


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=numbers, default=[2, 8], help="how many, separated by commas")
    parser.add_argument("--seqlen", type=int, default=32768, help="tokens, a multiple of twice the workers")
    arguments = parser.parse_args()
    if any(workers < 1 or arguments.seqlen % (2 * workers) for workers in arguments.workers):
        parser.error(f"--seqlen: expected a multiple of twice the workers, got {arguments.seqlen}")
    table = Table(*["mask", *(f"{workers} workers" for workers in arguments.workers)])
    for name in MASKS:
        cells = []
        for workers in arguments.workers:
            mask = Case(name, arguments.seqlen, 64, 1, SAMPLES, "float32").indices()
            chunks = seen_by_chunks(mask, arguments.seqlen, 2 * workers)
            ours, others = (busiest(chunks, workers, neighbouring) for neighbouring in (False, True))
            cells.append(f"{ours.mean():.2f}, {ours.max():.2f} ({others.mean():.2f})")
        table.add_row(name, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
