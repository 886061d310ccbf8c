"""Draw the figures of benchmarks/kernels.py: rates by mask for every length and head dim, and a summary of ratios.

python docs/make_kernel_plots.py benchmarks/results/h200-flex-64-128.json --overwrite

Bars count every 128x128 tile that is not fully masked as full (the paper's way), forward and backward together. What
benchmarks/summary.py makes of the file is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import summary

NAMES = {
    "ours": "paddle-flashmask",
    "ours_sm80": "paddle-flashmask, portable kernels",
    "ours_deterministic": "paddle-flashmask, deterministic",
    "flex": "FlexAttention",
    "sdpa": "cuDNN",
    "sdpa_flash": "FlashAttention-2",
    "fa4": "flash-attn-4",
    "dense": "SDPA, dense mask",
}


def draw(result: dict[str, Any], head_dim: int, path: Path) -> None:
    rows = [row for row in result["rows"] if row["head_dim"] == head_dim and row["bwd_ms"] is not None]
    masks, rivals, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mask", "rival", "seqlen"))
    figure = Figure(figsize=(12, 3 * len(lengths) + 0.8), layout="constrained")
    grid = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for axes, seqlen in zip(grid, lengths, strict=True):
        rates = {(row["mask"], row["rival"]): row["tflops_total_by_tile"] for row in rows if row["seqlen"] == seqlen}
        for number, rival in enumerate(rivals):
            place = np.arange(len(masks)) + (number - (len(rivals) - 1) / 2) * 0.8 / len(rivals)
            heights = [rates.get((mask, rival), 0.0) for mask in masks]
            axes.bar(place, heights, 0.8 / len(rivals), label=NAMES.get(rival, rival))
        axes.set(ylabel="TFLOPs/s by tile", title=f"{seqlen // 1024}K tokens a sequence, head dim {head_dim}")
        axes.grid(axis="y", alpha=0.3)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=7, fontsize="small", loc="outside lower center")
    grid[-1].set_xticks(np.arange(len(masks)), [mask.replace("_", "\n") for mask in masks], fontsize="small")
    machine = result["machine"]
    figure.suptitle(f"{machine.get('gpu', machine.get('cpu'))}; commit {result['commit']}", fontsize="small")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of benchmarks/kernels.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="folder")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    arguments = parser.parse_args()
    result = json.loads(arguments.results.read_text())
    for head_dim in sorted({row["head_dim"] for row in result["rows"]}):
        path = arguments.out / f"{arguments.results.stem}-d{head_dim}.png"
        if path.exists() and not arguments.overwrite:
            parser.error(f"{path} is there; --overwrite replaces it")
        draw(result, head_dim, path)
        print(path)
    summary.show(result)


if __name__ == "__main__":
    main()
