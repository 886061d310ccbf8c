"""benchmarks/summary.py on figures whose ratios are known, and the plots made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def summary(load):
    return load("benchmarks.summary")


def row(
    rival: str, mask: str, fwd: float, bwd: float | None, tiles: float = 0.5, head_dim: int = 128
) -> dict[str, Any]:
    made = {"mask": mask, "seqlen": 8192, "head_dim": head_dim, "rival": rival, "fwd_ms": fwd, "bwd_ms": bwd}
    return made | {"unskipped_tiles_128": tiles, "tflops_total_by_tile": 100.0}


ROWS = [
    row("ours", "causal", 10.0, 20.0),
    row("ours", "full", 20.0, 40.0, tiles=1.0),
    row("ours", "document", 5.0, 16.0, tiles=0.25),  # half the work: forward as fast as causal, backward 0.625
    row("ours", "random_eviction", 10.0, 25.0),
    row("ours", "causal", 10.0, 30.0, head_dim=256),
    row("ours_deterministic", "causal", 10.0, 22.0),
    row("ours_deterministic", "document", 5.0, 20.0, tiles=0.25),
    row("flex", "causal", 15.0, 45.0),
    row("flex", "document", 10.0, 21.0, tiles=0.25),
    row("sdpa", "causal", 9.5, 21.0),
    row("fa4", "causal", 11.0, 19.0),
    row("fa4", "full", 19.0, 44.0, tiles=1.0),
    row("sdpa", "causal", 9.0, 33.0, head_dim=256),
    row("cpu_like", "causal", 1.0, None),
]


def test_rates_over_causal(summary):
    found = summary.over_causal(ROWS, "ours")
    assert set(found) == {(8192, 128, mask) for mask in ("full", "document", "random_eviction")}
    assert found[8192, 128, "document"] == pytest.approx({"forward": 1.0, "backward": 0.625, "total": 15 / 21})
    assert found[8192, 128, "full"] == pytest.approx({"forward": 1.0, "backward": 1.0, "total": 1.0})


def test_goals(summary):
    goals = {goal.name: goal for goal in summary.goals(ROWS)}

    def worst(name: str) -> tuple[str, float, str]:
        return (*goals[name].worst(), goals[name].verdict())

    best = goals["full, causal: best rival / ours, d = 64, 128"]
    assert best.values == pytest.approx(
        {
            "forward causal 8K d=128 (sdpa)": 0.95,
            "forward full 8K d=128 (fa4)": 0.95,
            "backward causal 8K d=128 (fa4)": 0.95,
            "backward full 8K d=128 (fa4)": 1.1,
        }
    )
    assert best.verdict() == "floor kept"
    assert worst("full, causal: cuDNN / ours, d = 256") == ("forward causal 8K d=256 (sdpa)", 0.9, "missed")
    assert worst("by-tile rate over own causal, forward") == ("forward full 8K d=128", 1.0, "met")
    assert worst("by-tile rate over own causal, backward") == ("backward document 8K d=128", 0.625, "missed")
    assert worst("the same, random eviction")[2] == "floor kept"
    mean = worst("FlexAttention / ours, d = 64, 128: geometric mean")
    assert mean == ("2 cases", pytest.approx((2.0 * 31 / 21) ** 0.5), "met")
    assert worst("FlexAttention / ours, d = 64, 128: smallest") == ("document 8K d=128", pytest.approx(31 / 21), "met")
    assert worst("deterministic backward / default") == ("document 8K d=128", 1.25, "missed")
    assert goals["FlexAttention / ours, d = 256: geometric mean"].verdict() == "not measured"
    assert goals["portable: by-tile rate over own causal"].verdict() == "not measured"


def test_plots_and_tables(tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"commit": "abc", "machine": {"gpu": "H100"}, "rows": ROWS}))
    command = [sys.executable, "docs/make_kernel_plots.py", str(path), "--out", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "h100-d128.png").stat().st_size > 1000
    assert (tmp_path / "h100-d256.png").exists()
    assert "1.00 / 0.62 / 0.71" in made.stdout
    assert "1.72 (1.48)" in made.stdout, "FlexAttention's total"
    assert "not measured" in made.stdout


def test_every_result_of_the_h200_is_read_or_passed_over():
    """The command of docs/hopper-kernel.md: files of other benchmarks lie beside those with times."""
    results = sorted(str(path) for path in (ROOT / "benchmarks" / "results").glob("h200-*.json"))
    command = [sys.executable, "benchmarks/summary.py", *results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NVIDIA H200") >= 8
    assert "no times in it" in done.stdout
