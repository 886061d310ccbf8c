"""LoRA adapters around a model, for every example that trains them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trl import ModelConfig
from paddlenlp.trl.llm_utils import get_lora_target_modules
from paddlenlp.utils.env import LORA_CONFIG_NAME, LORA_WEIGHTS_NAME, SAFE_PEFT_WEIGHTS_INDEX_NAME
from safetensors import safe_open


def add_adapters(model: Any, model_args: ModelConfig, also_trained: list[str] | None = None) -> LoRAModel:
    """`model` with new adapters or, with --lora_path, with those of a folder. Only they are trained.

    `also_trained` are patterns for the names of other weights that are trained, and saved with the adapters.
    """
    if model_args.lora_path:
        model = LoRAModel.from_pretrained(model, model_args.lora_path)
        check_fit(model, Path(model_args.lora_path))
        if also_trained:  # adapters of another task may have been trained without them
            model.lora_config.trainable_modules = also_trained
    else:
        rank = model_args.lora_rank
        config = LoRAConfig(
            target_modules=get_lora_target_modules(model),
            trainable_modules=also_trained,
            r=rank,
            lora_alpha=2 * rank,
            rslora=model_args.rslora,
            lora_plus_scale=model_args.lora_plus_scale,
            dtype=model.config.dtype,
        )
        model = LoRAModel(model, config)
    model.mark_only_lora_as_trainable()
    total = sum(parameter.size for parameter in model.parameters())
    print(f"{trained_weights(model):,} of {total:,} weights are trained (rank {model.lora_config.r})", flush=True)
    return model


def check_fit(model: LoRAModel, folder: Path) -> None:
    """End the program unless `folder` has each of the model's adapters, and no others.

    PaddleNLP passes over what does not fit, and leaves adapters that change nothing yet.
    """
    saved = {name: tuple(shape) for name, shape in saved_shapes(folder) if "lora_" in name}
    own = {name: tuple(weight.shape) for name, weight in model.model.state_dict().items() if "lora_" in name}
    wrong = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
    if wrong:
        name = wrong[0]
        raise SystemExit(
            f"--lora_path {folder} has the adapters of another model: {len(wrong)} of {len(own)} do not fit, the first "
            f"of them {name}: expected {own.get(name, 'none')}, got {saved.get(name, 'none')}"
        )


def saved_shapes(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and shape of each weight that a LoRA run has saved, in either of PaddleNLP's formats."""
    index = folder / SAFE_PEFT_WEIGHTS_INDEX_NAME  # of --unified_checkpoint true; PaddleNLP looks for it first, too
    if index.is_file():
        for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            with safe_open(str(folder / file), framework="np") as opened:
                yield from ((name, opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    elif (folder / LORA_WEIGHTS_NAME).is_file():
        weights = paddle.load(str(folder / LORA_WEIGHTS_NAME), return_numpy=True)
        yield from ((name, weight.shape) for name, weight in weights.items())


def check_checkpoint(model_args: ModelConfig, checkpoint: str | None) -> None:
    """End the program where --resume_from_checkpoint does not have the adapters that this run trains.

    PaddleNLP would go on with new ones, and say nothing.
    """
    if checkpoint is None:
        return
    if not (Path(checkpoint) / LORA_CONFIG_NAME).is_file():
        raise SystemExit(
            f"--resume_from_checkpoint must be a folder that a LoRA run has saved, with its {LORA_CONFIG_NAME}; got "
            f"{checkpoint}"
        )
    saved = LoRAConfig.from_pretrained(checkpoint)
    if model_args.lora_path:
        own = LoRAConfig.from_pretrained(model_args.lora_path)
        given = {"the rank of --lora_path": (own.r, saved.r), "rslora of --lora_path": (own.rslora, saved.rslora)}
    else:
        given = {"--lora_rank": (model_args.lora_rank, saved.r), "--rslora": (model_args.rslora, saved.rslora)}
    for name, (value, expected) in given.items():
        if value != expected:
            raise SystemExit(
                f"{name} must be that of --resume_from_checkpoint {checkpoint}: expected {expected}, got {value}"
            )


def trained_weights(model: Any) -> int:
    return sum(parameter.size for parameter in model.parameters() if not parameter.stop_gradient)
