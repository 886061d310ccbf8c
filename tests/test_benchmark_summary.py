"""benchmarks/summary.py on figures whose ratios are known, and the plots made from them."""

from __future__ import annotations

import json
import re
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
    row("ours", "sliding_window", 4.0, 10.0, tiles=0.1, head_dim=256),
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
    assert set(found) == {
        *((8192, 128, mask) for mask in ("full", "document", "random_eviction")),
        (8192, 256, "sliding_window"),
    }
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
    # Forward and backward apart and not together; what masks nothing is no mask, and random eviction is by itself.
    masked = goals["by-tile rate over own causal"]
    assert masked.values == pytest.approx(
        {
            "forward document 8K d=128": 1.0,
            "backward document 8K d=128": 0.625,
            "forward sliding_window 8K d=256": 0.5,
            "backward sliding_window 8K d=256": 0.6,
        }
    )
    assert (masked.target, masked.floor, masked.verdict()) == (0.95, 0.85, "missed")
    eviction = goals["the same, random eviction"]
    assert eviction.values == pytest.approx(
        {"forward random_eviction 8K d=128": 1.0, "backward random_eviction 8K d=128": 0.8}
    )
    assert (eviction.target, eviction.floor, eviction.verdict()) == (0.85, 0.70, "floor kept")
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


def test_each_head_dim_counts_in_one_file(summary):
    """The one with most lengths of masks, of several the newest, of several the last."""

    def result(measured: str, lengths: list[int], masks: list[str], head_dims: list[int]) -> dict[str, Any]:
        cases = [(seqlen, mask, head_dim) for seqlen in lengths for mask in masks for head_dim in head_dims]
        rows = [row("ours", mask, 1.0, 1.0, head_dim=head_dim) | {"seqlen": seqlen} for seqlen, mask, head_dim in cases]
        return {"measured": measured, "rows": rows}

    both, long = ["causal", "document"], [8192, 32768]
    results = {
        "older": result("2026-01-01", long, both, [64, 128, 256]),
        "newer": result("2026-01-02", long, both, [64, 128]),
        "as new": result("2026-01-02", long, both, [128]),
        "short": result("2026-01-03", [8192], both, [64, 256]),
        "unmasked": result("2026-01-03", [*long, 131072], ["causal", "full"], [64, 512]),
    }
    rows, files = summary.joined(results)
    assert files == {64: "newer", 128: "as new", 256: "older"}
    places = [(each["seqlen"], each["head_dim"], each["mask"]) for each in rows]
    assert sorted(places) == sorted((s, d, mask) for s in long for d in (64, 128, 256) for mask in both)


def test_the_command_of_the_documents():
    """Files of other benchmarks lie beside those with times; what is counted over the rest is what is written."""
    results = sorted(str(path) for path in (ROOT / "benchmarks" / "results").glob("h200-*.json"))
    command = [sys.executable, "benchmarks/summary.py", *results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NVIDIA H200") >= 8
    assert "no times in it" in done.stdout
    goals = done.stdout[done.stdout.index("over all head dims") :]
    text = (ROOT / "docs" / "hopper-kernel.md").read_text()
    reached, floor = re.search(r"by-tile rate over own causal .*?(\d+ of \d+) .*?(\d+) of \d+", goals).groups()
    assert f"| {reached} (nine masks" in text
    assert f"the floor in {floor}," in text
    (reached,) = re.search(r"the same, random eviction .*?(\d+ of \d+) ", goals).groups()
    assert f"| random eviction within 0.85 (floor 0.70) | {reached} " in text
