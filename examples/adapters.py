"""LoRA adapters around a model, for every example that trains them."""

from __future__ import annotations

from typing import Any

from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trl import ModelConfig
from paddlenlp.trl.llm_utils import get_lora_target_modules


def add_adapters(model: Any, model_args: ModelConfig, also_trained: list[str] | None = None) -> LoRAModel:
    """`model` with new adapters or, with --lora_path, with those of a folder. Only they are trained.

    `also_trained` are patterns for the names of other weights that are trained, and saved with the adapters.
    """
    if model_args.lora_path:
        model = LoRAModel.from_pretrained(model, model_args.lora_path)
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


def trained_weights(model: Any) -> int:
    return sum(parameter.size for parameter in model.parameters() if not parameter.stop_gradient)
