"""PaddleNLP's models that take row indices."""

from __future__ import annotations

__all__ = ["CARRIED", "FAMILIES", "MODELS"]

# Folder under paddlenlp/transformers -> prefix of its class names.
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "deepseek_v2": "DeepseekV2"}

# Those whose forward has no argument for row indices of its own; see carried.py.
CARRIED = {
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "qwen": "QWen",
    "chatglm_v2": "ChatGLMv2",
    "gpt": "GPT",
}

MODELS: tuple[str, ...] = tuple(
    f"{prefix}ForCausalLM" for prefix in (*FAMILIES.values(), "DeepseekV3", *CARRIED.values())
)
"""Names of the classes in ``paddlenlp.transformers`` whose forward takes ``attn_mask_startend_row_indices`` once the
routing is on. The first four take them without it too."""
