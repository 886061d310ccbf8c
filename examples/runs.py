"""What the examples share about a run: its arguments, its folder, its progress bar, and what it measures."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import paddle
from paddlenlp.trainer import PdArgumentParser, TrainerCallback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def new_folder(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, `path`-3, ... if there is one already: no run overwrites another."""
    if path.name in ("", ".."):  # such as ".": there is nothing to append a number to
        path = path.resolve()
    if not path.name:
        raise SystemExit(f"--output_dir must be a folder that can be made, got {path}")
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


# Of PaddleNLP's ModelConfig: other ways to fine-tune, which the examples do not know and would otherwise pass over.
OTHER_METHODS = (
    *("prefix_tuning", "prefix_path", "pissa", "lora_use_mixer", "use_mora", "use_quick_lora", "vera", "lokr"),
    *("lokr_path", "reft", "neftune", "weight_quantize_algo", "use_long_sequence_strategies"),
)

# Of PaddleNLP's DataConfig and SFTConfig: what would change the samples or the evaluation in PaddleNLP's own script,
# and what the examples do instead. Only the defaults are let through. Options that change neither (lazy,
# pad_to_max_length, ...) are not here.
OTHER_DATA = {
    "task_name": "--dataset_name_or_path is a file or a folder with train.json",
    "zero_padding": "samples always share rows of --max_length tokens",
    "src_length": "no prompt is cut; samples of more than --max_length tokens are left out",
    "max_seq_length": "the tokens of a row are --max_length",
    "chat_template": "texts are used as they are; put the template into src",
    "autoregressive": "answers are learned and prompts are not",
    "use_pose_convert": "position ids count the tokens of each sample from 0",
    "eval_with_do_generation": "evaluation computes the loss and generates nothing",
    "save_generation_output": "evaluation computes the loss and generates nothing",
}

# The same of PaddleNLP's ModelConfig: what its own script does to the model, or with it. Not here are options that say
# how something is done that is refused or off (vera_rank, strategy_name, aistudio_repo_id, ...).
OTHER_MODEL = {
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), "dropout is what the model's config.json says"
    ),
    **dict.fromkeys(
        ("fuse_attention_qkv", "fuse_attention_ffn", "use_fast_layer_norm"),
        "which weights and layers are fused is what the model's config.json says",
    ),
    "continue_training": "--model_name_or_path always starts from its weights; without it a small model is random",
    "from_aistudio": "--model_name_or_path is a folder, or a name on another hub",
    "save_to_aistudio": "the model is saved to --output_dir only",
}


def parse(*classes: type) -> tuple[Any, ...]:
    """One object of each class from the command line, whose first word may be a JSON file with arguments."""
    parser = PdArgumentParser(classes)
    parser.set_defaults(logging_steps=1)  # `Watch` needs every loss; PaddleNLP's default is 500
    if any(field.name == "zero_padding" for each in classes for field in dataclasses.fields(each)):
        parser.set_defaults(zero_padding=True)  # PaddleNLP's default is False, and could not be told from a given one
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        parsed = parser.parse_json_file_and_cmd_lines()
    else:
        parsed = parser.parse_args_into_dataclasses()
    for name, given in ((name, getattr(arguments, name, None)) for arguments in parsed for name in OTHER_METHODS):
        if given:
            raise SystemExit(f"--{name}: the examples train all weights or LoRA adapters, got {given}")
    for arguments in parsed:
        for field in dataclasses.fields(arguments):
            given, expected = getattr(arguments, field.name), field.name == "zero_padding" or field.default
            instead = OTHER_DATA.get(field.name) or OTHER_MODEL.get(field.name)
            if instead and given != expected and (given or expected):
                raise SystemExit(f"--{field.name}: {instead}; expected {expected}, got {given}")
    return parsed


def run_folder(training_args: Any, compare: bool) -> Path:
    """The folder of --output_dir: a new one, or with --resume_from_checkpoint the one that is there.

    What would fail only after the model is loaded, or after training, ends the program here.
    """
    if training_args.world_size > 1:
        raise SystemExit(
            f"the examples run in one process, got {training_args.world_size} processes; for several, write a script "
            "of your own: docs/paddlenlp.md"
        )
    strategy = training_args.logging_strategy.value
    if strategy != "steps" or training_args.logging_steps != 1:
        raise SystemExit(
            "--logging_steps must be 1 and --logging_strategy steps, because the report needs the loss of every step; "
            f"got {training_args.logging_steps} and {strategy}"
        )
    if training_args.device == "cpu":  # PaddleNLP's trainers leave it to the script
        paddle.set_device("cpu")
    # --device is "gpu" unless given, and Paddle decides by itself where there is none.
    if training_args.fp16 and "cpu" in (training_args.device, paddle.get_device()):
        # Paddle's GradScaler does nothing there, and PaddleNLP asks after the first step what it has found.
        raise SystemExit("--fp16 true does not train on a CPU: expected --fp16 false (or --bf16 true), or --device gpu")
    folder, checkpoint = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if checkpoint is None:
        folder = new_folder(folder)
        training_args.output_dir = str(folder)
        return folder
    if compare:
        raise SystemExit(
            "--resume_from_checkpoint with --compare true: resume one of the two runs, with --compare false, its own "
            "--output_dir and its --flash_mask"
        )
    if not Path(checkpoint).is_dir():
        raise SystemExit(f"--resume_from_checkpoint must be a folder that a run has saved, got {checkpoint}")
    last = last_step(training_args)
    if last >= training_args.max_steps > 0:
        # PaddleNLP would train one step more, and the model of that step replace the one that is there.
        raise SystemExit(
            f"--max_steps must be above the {last} steps that {checkpoint} has made, got {training_args.max_steps}: "
            "nothing is left to train"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def last_step(training_args: Any) -> int:
    """The step from which --resume_from_checkpoint goes on, 0 without it."""
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None or training_args.ignore_load_lr_and_optim:  # which starts again from step 1
        return 0
    try:
        return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            "--resume_from_checkpoint must be a folder checkpoint-N that a run has saved, with its trainer_state.json; "
            f"got {checkpoint} ({error!r})"
        ) from error


def check_steps(training_args: Any, dataset: Any) -> None:
    """End the program where there is no step to make, before a model is loaded. `run_folder` knew no rows."""
    size = training_args.per_device_train_batch_size
    batches = math.ceil(len(dataset) / size)
    if training_args.dataloader_drop_last:
        batches = len(dataset) // size
        if not batches:
            raise SystemExit(
                f"--dataloader_drop_last true leaves no batch of --per_device_train_batch_size {size}: expected at "
                f"least {size} rows, got {len(dataset)}; or --dataloader_drop_last false"
            )
    last = last_step(training_args)
    if training_args.max_steps <= 0 and last:  # as PaddleNLP counts them
        steps = max(batches // training_args.gradient_accumulation_steps, 1) * training_args.num_train_epochs
        if last >= int(steps):
            raise SystemExit(
                f"--num_train_epochs {training_args.num_train_epochs:g} are {int(steps)} steps of these rows, and "
                f"{training_args.resume_from_checkpoint} has made {last}: nothing is left to train"
            )


def memory_mib(field: str) -> float:
    """Resident memory of this process in MiB: `VmRSS` now, or `VmHWM` at its highest since the program started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Let `VmHWM` start again from what is resident now; where the kernel refuses, it goes on from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Watch(TrainerCallback):
    """A progress bar with the loss; and loss, time and memory of the run.

    Time and peak memory are of the steps after the first one, which also sets things up and, with --flash_mask_verify,
    computes the dense reference. They include making batches. Needs --logging_steps 1.
    """

    def __init__(self, name: str, tokens_per_row: int) -> None:
        self.tokens_per_row = tokens_per_row
        self.losses: list[float] = []
        self.step_ends: list[float] = []
        self.first_step = 1
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
        self.first_step = state.global_step + 1
        self.before_training = memory_mib("VmRSS")
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.step_ends:
            forget_peak()
        self.step_ends.append(time.perf_counter())
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))
            self.bar.update(self.task, loss=f"{self.losses[-1]:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

    def result(self) -> dict[str, Any]:
        """Speed (tokens/s, padding included), memory of the process at its peak and before training, losses.

        The speed is None where there are no two steps to measure it.
        """
        timed = len(self.step_ends) - 1
        speed = self.tokens_per_step * timed / (self.step_ends[-1] - self.step_ends[0]) if timed > 0 else None
        return {
            "tokens_per_s": speed,
            "peak_mib": memory_mib("VmHWM"),
            "before_training_mib": self.before_training,
            "losses": self.losses,
            "first_step": self.first_step,
            "steps": len(self.step_ends),
            "seq_len": self.tokens_per_row,
        }


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
    """Loss, margin and accuracy of `Trainer.evaluate`, by the same names for every trainer that has them."""
    short = {key.replace("eval_", "").replace("rewards/", ""): value for key, value in metrics.items()}
    names = {"loss": "loss", "margins": "margin", "margin": "margin", "accuracies": "accuracy", "accuracy": "accuracy"}
    return {names[key]: value for key, value in short.items() if key in names}


def train(trainer: Any, watch: Watch) -> dict[str, Any]:
    """Evaluate if there is a set for it, train or resume, evaluate again, save; what there is to report of it."""
    evaluates, checkpoint = trainer.eval_dataset is not None, trainer.args.resume_from_checkpoint
    # PaddleNLP loads the checkpoint when training begins: until then this is the model that the first run began with.
    before = evaluation(trainer.evaluate()) if evaluates and checkpoint is None else None
    trainer.train(resume_from_checkpoint=checkpoint)
    after = evaluation(trainer.evaluate()) if evaluates else None
    if trainer.args.save_strategy.value != "no":
        trainer.save_model()
    return {**watch.result(), "evaluation": {"before": before, "after": after} if evaluates else None}
