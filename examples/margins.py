"""What the examples for preferences share: reward margins beside the loss, and their summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compare import draw_curves
from rich.console import Console
from rich.table import Table
from runs import Watch

from paddle_flashmask.paddlenlp import PreferenceDataset


class MarginWatch(Watch):
    """`Watch` that keeps the reward margin of every step as well: the key `margin` of the trainer's logs."""

    def __init__(self, name: str, tokens_per_row: int, margin: str) -> None:
        super().__init__(name, tokens_per_row)
        self.margin = margin
        self.margins: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if self.margin in (logs or {}):
            self.margins.append(float(logs[self.margin]))

    def result(self) -> dict[str, Any]:
        return {**super().result(), "margins": self.margins}


def evaluation(metrics: dict[str, float]) -> dict[str, float]:
    """Loss, margin and accuracy of `Trainer.evaluate`, by the same names for DPOTrainer and RewardTrainer."""
    short = {key.replace("eval_", "").replace("rewards/", ""): value for key, value in metrics.items()}
    return {
        "loss": short["loss"],
        "margin": short.get("margins", short.get("margin")),
        "accuracy": short.get("accuracies", short.get("accuracy")),
    }


def first_row_groups(dataset: PreferenceDataset) -> list[list[int]]:
    """Lengths `[prompt, answer, answer, ...]` of the groups in the first row, for a picture of its mask."""
    groups: dict[int, list[int]] = {}
    before = 0
    for start, end, group in dataset[0]["branches"].tolist():
        groups.setdefault(group, [start - before]).append(end - start)
        before = end
    return list(groups.values())


def report(title: str, folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, loss.png and margin.png, and print what matters of it."""
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    results = {result["mask"]: result}
    draw_curves(results, "losses", "loss", f"{title}: training loss", folder / "loss.png")
    draw_curves(results, "margins", "reward margin", f"{title}: better minus worse answer", folder / "margin.png")
    table = Table(title=f"{title}, {result['steps']} steps", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("training loss", f"{result['losses'][0]:.4f}", f"{result['losses'][-1]:.4f}")
    for key, form in (("loss", ".4f"), ("margin", ".4f"), ("accuracy", ".1%")):
        if result["evaluation"]:
            before, after = (result["evaluation"][time][key] for time in ("before", "after"))
            table.add_row(f"evaluation {key}", format(before, form), format(after, form))
    table.add_row("tokens/s", "", f"{result['tokens_per_s']:,.0f}")
    table.add_row("peak memory, MiB", "", f"{result['peak_mib']:,.0f}")
    console = Console()
    console.print(table)
    console.print(f"In {folder}: result.json, loss.png, margin.png", highlight=False)
