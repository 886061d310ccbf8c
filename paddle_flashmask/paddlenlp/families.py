"""PaddleNLP's models that take row indices."""

from __future__ import annotations

__all__ = ["FAMILIES", "MODELS"]

# Folder under paddlenlp/transformers -> prefix of its class names.
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "deepseek_v2": "DeepseekV2"}

MODELS: tuple[str, ...] = tuple(f"{prefix}ForCausalLM" for prefix in FAMILIES.values())
"""Names of the classes in ``paddlenlp.transformers`` whose forward takes ``attn_mask_startend_row_indices``."""
