"""benchmarks/context_balance.py counts what the masks show, for the chunks that workers have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_flashmask import masks
from paddle_flashmask.distributed.shards import Worker

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def balance(load):
    return load("benchmarks.context_balance")


def test_scores_of_chunks(balance):
    mask = masks.document([[10, 30, 24], [50, 14]])
    dense = masks.to_dense(*mask, 64, 64)[:, 0]
    chunks = balance.seen_by_chunks(mask, 64, 8)
    np.testing.assert_array_equal(chunks, dense.reshape(2, 8, 8, 64).sum(axis=(2, 3)))
    work = np.array([[row[list(Worker(rank, 4).chunks)].sum() for rank in range(4)] for row in chunks])
    np.testing.assert_allclose(balance.busiest(chunks, 4, False), work.max(axis=1) / work.mean(axis=1))
    neighbours = chunks.reshape(2, 4, 2).sum(axis=2)
    np.testing.assert_allclose(balance.busiest(chunks, 4, True), neighbours.max(axis=1) / neighbours.mean(axis=1))


def test_the_table_of_the_documents():
    """What docs/context-parallel.md says is what the script prints."""
    command = [sys.executable, "benchmarks/context_balance.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = [
        [cell.strip() for cell in line.strip("│\n ").split("│")] for line in done.stdout.splitlines() if "│" in line
    ]
    text = (ROOT / "docs" / "context-parallel.md").read_text()
    assert len(printed) == 12
    for row in printed:
        assert f"| {' | '.join(row)} |\n" in text


def test_bad_sizes():
    command = [sys.executable, "benchmarks/context_balance.py", "--seqlen", "100", "--workers", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--seqlen: expected a multiple of twice the workers, got 100" in done.stderr
