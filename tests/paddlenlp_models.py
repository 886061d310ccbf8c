"""Tiny PaddleNLP models and packed batches for the tests of paddle_flashmask.paddlenlp."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import paddle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from paddlenlp import transformers
    from paddlenlp.utils.log import logger

import paddle_flashmask.paddlenlp as flashmask_nlp

logger.set_level("ERROR")
logging.getLogger("paddle").setLevel(logging.ERROR)

VOCABULARY = 61
LENGTH = 48

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for attention to be far from uniform, so that a wrong mask shows.
    "initializer_range": 0.2,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "DeepseekV2": {
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        # PaddleNLP's plain rotary embedding fails for DeepSeek-V2; its released models use YaRN.
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    },
}
FAMILIES = tuple(_SPECIFIC)


def config(family: str, **changes: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**{**_COMMON, **_SPECIFIC[family], **changes})


def model(family: str, **changes: Any) -> Any:
    """A model with the same random weights each time, in training mode."""
    paddle.seed(7)
    made = getattr(transformers, f"{family}ForCausalLM")(config(family, **changes))
    made.train()
    return made


def samples(lengths: tuple[int, ...], seed: int = 0) -> list[dict[str, list[int]]]:
    random = np.random.default_rng(seed)
    return [{key: random.integers(1, VOCABULARY, n).tolist() for key in ("input_ids", "labels")} for n in lengths]


def batches(lengths: tuple[int, ...] = (13, 20, 15, 30, 11), length: int = LENGTH) -> dict[str, dict[str, Any]]:
    """The same packed rows with row indices (``flashmask``) and with a dense mask (``dense``), as Paddle tensors."""
    dataset = flashmask_nlp.PackedDataset(samples(lengths), length, strategy="in_order")
    rows = [dataset[index] for index in range(len(dataset))]
    return {
        mask: {k: paddle.to_tensor(v) for k, v in flashmask_nlp.PackingCollator(length, mask=mask)(rows).items()}
        for mask in ("flashmask", "dense")
    }


def loss_and_gradients(
    net: Any, batch: dict[str, Any], use_flash_attention: bool
) -> tuple[float, dict[str, np.ndarray]]:
    net.config.use_flash_attention = use_flash_attention
    net.clear_gradients()
    out = net(**batch)
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    return float(loss), {name: p.grad.numpy().copy() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(got: tuple[float, dict], expected: tuple[float, dict], tolerance: float = 1e-5) -> None:
    """Losses and every gradient are equal up to float32 rounding (relative to each gradient's largest entry)."""
    assert abs(got[0] - expected[0]) <= 1e-6 * abs(expected[0])
    assert got[1].keys() == expected[1].keys()
    assert len(expected[1]) > 10
    for name, gradient in expected[1].items():
        scale = np.abs(gradient).max()
        assert np.abs(got[1][name] - gradient).max() <= tolerance * max(scale, 1e-3), name


class SwallowsEverything(paddle.nn.Layer):
    """A model that takes any argument and uses none."""

    def forward(self, input_ids, **kwargs):
        return input_ids
