"""Curves and the closing summary of a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MASKS = {"flashmask": "FlashMask", "dense": "dense mask"}
EVALUATED = (("loss", ".4f"), ("margin", ".4f"), ("accuracy", ".1%"))


def draw_curves(results: dict[str, dict[str, Any]], key: str, label: str, title: str, path: Path) -> None:
    """One value a step of one run or both."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # The dense curve is wide and pale: the two lie on top of each other.
    for name, style in (("dense", {"lw": 5, "alpha": 0.4}), ("flashmask", {"lw": 1.5})):
        if name in results:
            values = results[name][key]
            first = results[name]["first_step"]  # not 1 in a resumed run
            axes.plot(range(first, first + len(values)), values, label=MASKS[name], **style)
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def report(title: str, folder: Path, result: dict[str, Any]) -> None:
    """Write result.json and the curves, and print what matters of it. `result["mask"]` is one of `MASKS`.

    A resumed run finds those of the run before it, and writes result-2.json, loss-2.png, ...
    """
    suffix = free_suffix(folder)
    (folder / f"result{suffix}.json").write_text(json.dumps(result, indent=2) + "\n")
    results = {result["mask"]: result}
    written = [f"result{suffix}.json", f"loss{suffix}.png"]
    draw_curves(results, "losses", "loss", f"{title}: training loss", folder / written[-1])
    if "margins" in result:
        written.append(f"margin{suffix}.png")
        draw_curves(results, "margins", "reward margin", f"{title}: better minus worse answer", folder / written[-1])
    table = Table(title=f"{title}, {result['steps']} steps, {MASKS[result['mask']]}", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("training loss, first and last step", f"{result['losses'][0]:.4f}", f"{result['losses'][-1]:.4f}")
    before, after = ((result["evaluation"] or {}).get(time) or {} for time in ("before", "after"))
    for key, form in EVALUATED:
        if key in after:
            table.add_row(f"evaluation {key}", shown(before.get(key), form), shown(after[key], form))
    table.add_row("tokens/s", "", shown(result["tokens_per_s"], ",.0f"))
    table.add_row("peak memory, MiB", "", f"{result['peak_mib']:,.0f}")
    console = Console()
    console.print(table)
    console.print(f"In {folder}: {', '.join(written)}", highlight=False)


def free_suffix(folder: Path) -> str:
    """What tells the files of this run from those already in `folder`: nothing, or -2, -3, ..."""
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(suffix for suffix in suffixes if not (folder / f"result{suffix}.json").exists())


def shown(value: float | None, form: str) -> str:
    """A figure of a table; "-" where there is none, such as the speed of a single step, or what a resumed run was."""
    return "-" if value is None else format(value, form)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))
