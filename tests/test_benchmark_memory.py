"""benchmarks/cuda/memory.py without a GPU: which documents it checks, and that it finds what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def memory(load):
    return load("benchmarks.cuda.memory")


def test_chosen_documents(memory):
    lengths = [5, 9, 2, 7, 4, 6]
    assert memory.chosen_documents(lengths, 1) == [(14, 16)]  # the shortest
    assert memory.chosen_documents(lengths, 4) == [(0, 5), (5, 14), (14, 16), (27, 33)]
    assert len(memory.chosen_documents(lengths, 5)) == 5
    assert memory.chosen_documents(lengths, 99) == [(0, 5), (5, 14), (14, 16), (16, 23), (23, 27), (27, 33)]
    assert memory.chosen_documents([8], 4) == [(0, 8)]


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_errors_in_one_row_of_a_document_show(memory, name):
    torch = pytest.importorskip("torch")
    dense = importlib.import_module("dense")
    masks = importlib.import_module("paddle_flashmask.masks")
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 60, 2, 16, dtype=torch.float64) for _ in range(4))
    indices, causal = masks.causal_document([[20, 25, 15]])
    sees = dense.visible(torch.from_numpy(indices), causal, 60, 60)
    got = dense.attention(*inputs[:3], sees, 0.25, dout=inputs[3])
    document = (20, 45)
    assert max(memory.errors(inputs, got, document, head=1).values()) < 1e-12
    row = (0, 1, 30) if name == "lse" else (0, 30, 1)
    got[name][row] += 1.0
    found = memory.errors(inputs, got, document, head=1)
    assert {each for each, value in found.items() if value > 1e-3} == {name}
    assert max(memory.errors(inputs, got, document, head=0).values()) < 1e-12
    assert max(memory.errors(inputs, got, (45, 60), head=1).values()) < 1e-12


def test_wrong(memory):
    good = {"finite": True, "largest_relative_errors": {"out": 0.004}}
    assert not memory.wrong(good, 1e-2)
    assert memory.wrong(good, 1e-3)
    assert memory.wrong(good | {"finite": False}, 1e-2)
    assert memory.wrong(good | {"largest_relative_errors": {"out": float("nan")}}, 1e-2)


@pytest.mark.parametrize("cases", ["131072", "131072:0", "a:1", "1:2:3"])
def test_bad_cases(cases):
    made = subprocess.run(
        [sys.executable, "benchmarks/cuda/memory.py", "--cases", cases], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 2
    assert "--cases: expected SEQLEN:HEADS" in made.stderr
