"""Runs an example twice, each time in a process of its own, with FlashMask and with a dense mask, and compares them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from reports import EVALUATED, MASKS, draw_curves, pictures, shown
from rich.console import Console
from rich.table import Table

from paddle_flashmask import masks
from paddle_flashmask.plotting import plot_mask_and_blocks


def compare(script: str, arguments: list[str], folder: Path, data: str | dict[str, str]) -> None:
    """Train both ways on the same batches from the same seed; write summary.json, loss.png and mask.png to `folder`.

    `data` is the value of --dataset_name_or_path, or a dictionary of the arguments that name the data. Runs that log
    reward margins give margin.png as well.
    """
    data = data if isinstance(data, dict) else {"dataset_name_or_path": data}
    results = {}
    for name in MASKS:
        overrides = {
            "compare": "false",
            "flash_mask": str(name == "flashmask").lower(),
            "output_dir": str(folder / name),
            **data,
        }
        settings = [part for key, value in overrides.items() for part in (f"--{key}", value)]
        run = subprocess.run([sys.executable, script, *arguments, *settings])
        if run.returncode != 0:
            raise SystemExit(f"the {MASKS[name]} run failed (exit status {run.returncode}); its output is above")
        results[name] = json.loads((folder / name / "result.json").read_text())

    summary = summarise(results)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_curves(results, "losses", "loss", "Training loss, same batches and seed", folder / "loss.png")
    if "margins" in results["flashmask"]:
        draw_curves(results, "margins", "reward margin", "Better minus worse answer", folder / "margin.png")
    draw_first_row(results["flashmask"], folder / "mask.png")
    print_table(summary, folder)


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    flashmask, dense = (results[name]["losses"] for name in MASKS)
    if len(flashmask) != len(dense):
        raise ValueError(f"the runs logged {len(flashmask)} and {len(dense)} losses; both must log every step")
    summary: dict[str, Any] = {
        name: {
            "tokens_per_s": None if result["tokens_per_s"] is None else round(result["tokens_per_s"], 1),
            "peak_mib": round(result["peak_mib"], 1),
            "final_loss": result["losses"][-1],
            "before_training_mib": round(result["before_training_mib"], 1),
        }
        for name, result in results.items()
    }
    for name, result in results.items():
        if result.get("evaluation"):
            summary[name]["evaluation"] = result["evaluation"]
    summary["max_loss_difference"] = float(np.abs(np.subtract(flashmask, dense)).max())
    summary["steps"] = results["flashmask"]["steps"]
    summary["seq_len"] = results["flashmask"]["seq_len"]
    return summary


def draw_first_row(result: dict[str, Any], path: Path) -> None:
    total = result["seq_len"]
    if "first_row_groups" in result:
        groups = result["first_row_groups"]
        title = f"A packed row: {len(groups)} prompts with their answers, {total} tokens"
        plot_mask_and_blocks(*masks.share_question([groups], total), total, title=title, path=path)
        return
    lengths = np.array(result["first_row_lengths"])
    indices = np.zeros((1, 1, total, 1), dtype=np.int32)
    indices[0, 0, : lengths.sum(), 0] = np.repeat(np.cumsum(lengths), lengths)
    title = f"A packed row: {len(lengths)} samples, {total} tokens"
    plot_mask_and_blocks(indices, True, total, title=title, path=path)


def print_table(summary: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"{summary['steps']} steps of {summary['seq_len']} tokens a row", title_justify="left")
    table.add_column("")
    for heading in ("FlashMask", "dense mask", ""):
        table.add_column(heading, justify="right")
    flashmask, dense = summary["flashmask"], summary["dense"]

    def row(label: str, key: str, form: str, with_ratio: bool = False) -> None:
        pair = flashmask[key], dense[key]
        ratio = f"{pair[0] / pair[1]:.2f}x" if with_ratio and None not in pair else ""
        table.add_row(label, *(shown(value, form) for value in pair), ratio)

    row("tokens/s", "tokens_per_s", ",.0f", with_ratio=True)
    row("peak memory, MiB", "peak_mib", ",.0f", with_ratio=True)
    row("  of it before training", "before_training_mib", ",.0f")
    row("final loss", "final_loss", ".4f")
    for key, form in EVALUATED:
        if key in flashmask.get("evaluation", {}).get("after", {}):
            runs = [run["evaluation"] for run in (flashmask, dense)]
            found = [" to ".join(format(run[time][key], form) for time in ("before", "after")) for run in runs]
            table.add_row(f"evaluation {key}", *found, "")
    console = Console()
    console.print(table)
    console.print(f"Largest difference of the losses over all steps: {summary['max_loss_difference']:.2e}")
    console.print(f"In {folder}: {', '.join(['summary.json', *pictures(folder)])}", highlight=False)
