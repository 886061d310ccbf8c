"""What the examples share about a run: its folder, its progress bar, and what it measures."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from paddlenlp.trainer import TrainerCallback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def new_folder(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, `path`-3, ... if there is one already: no run overwrites another."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


def memory_mib(field: str) -> float:
    """Resident memory of this process in MiB: `VmRSS` now, or `VmHWM` at its highest since the program started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


class Watch(TrainerCallback):
    """A progress bar with the loss; and loss, time and memory of the run.

    Time runs from the end of the first step, which also sets things up, to the end of the last one: it includes making
    batches. Needs --logging_steps 1.
    """

    def __init__(self, name: str, tokens_per_row: int) -> None:
        self.tokens_per_row = tokens_per_row
        self.losses: list[float] = []
        self.step_ends: list[float] = []
        self.before_training = 0.0
        self.tokens_per_step = 0
        self.bar = Progress(
            TextColumn(f"{name:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size
        self.tokens_per_step = rows * self.tokens_per_row
        self.before_training = memory_mib("VmRSS")
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ends.append(time.perf_counter())
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))
            self.bar.update(self.task, loss=f"{self.losses[-1]:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

    def result(self) -> dict[str, Any]:
        """Speed (tokens/s, padding included), memory of the whole process at its peak and before training, losses."""
        if len(self.step_ends) < 2:
            raise ValueError(f"--max_steps must be at least 2 to measure a speed, got {len(self.step_ends)}")
        seconds = self.step_ends[-1] - self.step_ends[0]
        return {
            "tokens_per_s": self.tokens_per_step * (len(self.step_ends) - 1) / seconds,
            "peak_mib": memory_mib("VmHWM"),
            "before_training_mib": self.before_training,
            "losses": self.losses,
            "steps": len(self.step_ends),
            "seq_len": self.tokens_per_row,
        }
