"""What is replaced for the models of ``carried``, and which models are refused and why."""

from __future__ import annotations

import inspect
from typing import Any

from . import carried, workarounds
from .families import CARRIED
from .guards import ROW_INDICES, exactly_causal
from .patching import Patch

__all__ = ["DROPS_MASK", "REFUSED", "carried_patches"]

_TRANSFORMERS = "paddlenlp.transformers"

DROPS_MASK = "a dense mask that shows the future, or the padding at a step of generation, is dropped"

_ALIBI = "it adds alibi to every score, which has no place beside row indices"
_BOTH_WAYS = "its prompts attend both ways, which these batches do not describe"
_NO_POSITIONS = "it takes no position_ids, so they cannot restart in each packed sample"
_ENCODER = "row indices say nothing of its encoder"
_STATE = "its {} carry a state over the ends of packed samples, which no attention mask can stop"

REFUSED: dict[str, tuple[str, str]] = {
    "BlenderbotForCausalLM": ("blenderbot", _NO_POSITIONS),
    "BlenderbotForConditionalGeneration": ("blenderbot", _ENCODER),
    "BlenderbotSmallForCausalLM": ("blenderbot_small", _NO_POSITIONS),
    "BloomForCausalLM": ("bloom", _ALIBI),
    "BloomForGeneration": ("bloom", _ALIBI),
    "ChatGLMForCausalLM": ("chatglm", _BOTH_WAYS),
    "CodeGenForCausalLM": ("codegen", _NO_POSITIONS),
    "CTRLLMHeadModel": ("ctrl", "its attention takes no mask but the padding's"),
    "ErnieForGeneration": ("ernie_gen", _BOTH_WAYS),
    "GLMForConditionalGeneration": ("glm", _BOTH_WAYS),
    "GPTJForCausalLM": ("gptj", "it never uses position_ids, so they cannot restart in each packed sample"),
    "JambaForCausalLM": ("jamba", _STATE.format("Mamba layers")),
    "MambaForCausalLM": ("mamba", _STATE.format("layers")),
    "OPTForCausalLM": ("opt", _NO_POSITIONS),
    "RWForCausalLM": ("rw", _NO_POSITIONS),
    "XLNetLMHeadModel": ("xlnet", "its attention is over permutations of the tokens"),
    "YuanForCausalLM": ("yuan", _STATE.format("filters over neighbouring tokens")),
}
"""Decoders that must not get row indices: class -> (folder, reason)."""


def _gpt_contradictions(config: Any) -> list[str]:
    if config.scale_qk_coeff != 1.0:
        return [f"scale_qk_coeff={config.scale_qk_coeff} scales the scores in dense attention only: set it to 1.0"]
    return []


def _chatglm_contradictions(config: Any) -> list[str]:
    if config.sequence_parallel:
        return ["sequence_parallel reshapes the attention's output in another order: set it to False"]
    return []


def _v3_takes_none() -> bool:
    from paddlenlp.transformers import DeepseekV3ForCausalLM

    return ROW_INDICES not in inspect.signature(DeepseekV3ForCausalLM.forward).parameters


def carried_patches() -> list[Patch]:
    """The replacements, apart from those for the models that take row indices by themselves."""
    table = []

    def add(target: str, build: Any, reason: str, **more: Any) -> None:
        table.append(Patch(f"{_TRANSFORMERS}.{target}", build, reason, **more))

    no_argument = "the model has no argument for row indices"
    builds_mask = "an O(N^2) dense mask is built that nothing uses"
    options: dict[str, dict[str, Any]] = {
        "chatglm_v2": {"contradictions": _chatglm_contradictions},
        "gpt": {"contradictions": _gpt_contradictions},
    }
    for folder, prefix in CARRIED.items():
        file = f"{folder}.modeling"
        add(f"{file}:{prefix}ForCausalLM.forward", carried.take_row_indices(**options.get(folder, {})), no_argument)
        add(f"{file}:recompute", carried.carry_through_recompute, "recomputation would lose the row indices")
        if folder == "gpt":
            add(f"{file}:MultiHeadAttention._flash_attention", carried.route_gpt, "the layers ignore masks")
            add(f"{file}:GPTModel.forward", carried.guard_dropped_mask, "use_flash_attention ignores a dense mask")
        elif folder == "chatglm_v2":
            mixes_up = "the layers attend through this module's F, and mix up the rows of a batch"
            add(f"{file}:F", carried.route_functional_length_first, mixes_up)
        else:
            add(f"{file}:F", carried.route_functional, "the layers attend through this module's F")
    for folder, prefix in (("mistral", "Mistral"), ("mixtral", "Mixtral"), ("gemma", "Gemma")):
        method = f"{folder}.modeling:{prefix}Model._prepare_decoder_attention_mask"
        add(method, carried.no_mask(lambda: None), builds_mask)
    for folder, prefix in (("mixtral", "Mixtral"), ("gemma", "Gemma")):
        add(f"{folder}.modeling:is_casual_mask", exactly_causal, DROPS_MASK)
        swallows = carried.refuse(f"it swallows them; call {prefix}ForCausalLM")
        add(f"{folder}.modeling:{prefix}Model.forward", swallows, "**kwargs swallows row indices")
    add("qwen.modeling:QWenModel.get_masks", carried.no_mask(carried.everything), builds_mask)
    add("chatglm_v2.modeling:ChatGLMv2PretrainedModel.get_masks", carried.no_mask(carried.everything), builds_mask)

    add(
        "mixtral.modeling:MixtralSparseMoeBlock.forward",
        workarounds.mixtral_experts,
        "the experts fail: Paddle 3's where gives vectors",
        needed=workarounds.where_gives_vectors,
    )
    add(
        "deepseek_v3.modeling:DeepseekV3ForCausalLM.forward",
        carried.hand_over,
        "the class takes no row indices although its model does",
        needed=_v3_takes_none,
    )
    for name, (folder, reason) in REFUSED.items():
        add(f"{folder}.modeling:{name}.forward", carried.refuse(reason), "row indices are no argument, or swallowed")
    return table
