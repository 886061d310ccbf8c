"""Draw the figures of benchmarks/training.py: tokens/s and memory against the tokens of a row.

python docs/make_training_plot.py benchmarks/results/training-cpu-zen4-2cores.json --overwrite
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

TITLES = {"sft": "SFT", "lora": "LoRA", "dpo": "DPO", "reward": "reward model"}
SERIES = {
    "flashmask": ("FlashMask", {"marker": "o", "color": "tab:blue"}),
    "dense": ("dense mask", {"marker": "s", "color": "tab:orange"}),
}
PANELS = (("tokens_per_s", "tokens/s"), ("training_mib", "MiB while training"))


def draw(result: dict[str, Any], path: Path) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    figure = Figure(figsize=(3 * len(tasks) + 1, 5.4), layout="constrained")
    grid = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for (key, label), axes in zip(PANELS, grid[:, column], strict=True):
            for mask, (name, style) in SERIES.items():
                rows = [row for row in result["rows"] if (row["task"], row["mask"]) == (task, mask)]
                axes.loglog([row["seqlen"] for row in rows], [row[key] for row in rows], label=name, **style)
            axes.grid(alpha=0.3, which="both")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(TITLES[task])
        lengths = sorted({row["seqlen"] for row in result["rows"]})
        grid[1, column].set(xlabel="tokens of a row", xticks=lengths)
        grid[1, column].set_xticklabels([f"{length // 1024}K" for length in lengths])
        grid[1, column].xaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].legend(loc="center left")
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, float32; commit {result['commit']}", fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of benchmarks/training.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "training_benchmark.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.overwrite:
        parser.error(f"{arguments.out} is there; --overwrite replaces it")
    draw(json.loads(arguments.results.read_text()), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
