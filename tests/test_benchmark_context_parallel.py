"""The speeds in docs/context-parallel.md are those of the results file; what context_parallel.py asks for is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def test_the_table_of_the_documents():
    rows = json.loads((ROOT / "benchmarks" / "results" / "h200-context-parallel.json").read_text())["rows"]
    text = (ROOT / "docs" / "context-parallel.md").read_text()
    assert len(rows) == 12
    for row in rows:
        cells = [row["mask"], f"{row['seqlen'] // 1024}K"]
        for ms in row["ms"].values():
            cells.append(f"{milliseconds(ms['one'])} to {milliseconds(ms['all'])}: {ms['one'] / ms['all']:.2f}")
        cells.append(" and ".join(f"{ms['communication']:.1f}" for ms in row["ms"].values()))
        assert f"| {' | '.join(cells)} |\n" in text
        assert all(error <= 0.005 for error in row["errors"].values())


def test_what_it_needs_is_said():
    command = [sys.executable, "benchmarks/cuda/context_parallel.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("context_parallel.py: ")  # PyTorch, a GPU, a library or torchrun
    done = subprocess.run(
        [*command, "--masks", "causal,nothing"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "--masks: expected some of" in done.stderr
