"""Where rotary embeddings fail packed rows: positions that a table has not, or factors that depend on the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

__all__ = ["rotary_trouble"]


def _beyond(name: str, limit: int, position_ids: Any, length: int) -> list[str]:
    """Positions that start again in each sample may fit although the row is longer, so they are looked at then."""
    reached = length if position_ids is None else int(position_ids.max()) + 1
    if reached <= limit:
        return []
    return [
        f"position_ids reach {reached - 1}, but {name} has a table of {limit} positions and would read behind it: "
        f"leave out samples of more than {limit} tokens, or cut them"
    ]


def _llama(model: Any, position_ids: Any, length: int, packed: bool) -> list[str]:
    attention = model.layers[0].self_attn if len(model.layers) else None
    embedding = getattr(attention, "rotary_emb", None)
    table = getattr(embedding, "cos_cached", None)  # [1, positions, 1, dim]; other strategies have none
    if table is None or length <= table.shape[1]:
        return []
    if type(embedding).__name__ == "LlamaDynamicNTKScalingRotaryEmbedding":
        if not packed:
            return []  # it grows with the row, as it is meant to
        return [
            f'rope_scaling_type="dynamic_ntk" scales the positions of all samples by the length of the row, here '
            f"{length}, beyond max_position_embeddings={table.shape[1]}: pack rows of at most that many tokens, or "
            'take rope_scaling_type="ntk" or "linear"'
        ]
    return _beyond(type(embedding).__name__, table.shape[1], position_ids, length)


def _chatglm(model: Any, position_ids: Any, length: int, packed: bool) -> list[str]:
    limit = model.config.max_sequence_length
    return _beyond("config.max_sequence_length", limit, position_ids, length) if length > limit else []


def _qwen(model: Any, position_ids: Any, length: int, packed: bool) -> list[str]:
    config = model.config
    used = [name for name in ("use_dynamic_ntk", "use_logn_attn") if getattr(config, name, False)]
    # Only out of training; but what it scales by then is kept, and used in training afterwards.
    if not packed or model.training or not used or length <= config.seq_length:
        return []
    return [
        f"{' and '.join(used)} in evaluation change with the length of the row, here {length}, beyond "
        f"config.seq_length={config.seq_length}: pack rows of at most that many tokens, or set them to False"
    ]


_FAMILIES: dict[str, Callable[[Any, Any, int, bool], list[str]]] = {
    "llama": _llama,
    "chatglm_v2": _chatglm,
    "qwen": _qwen,
}


@paddle.jit.not_to_static
def rotary_trouble(model: Any, input_ids: Any, position_ids: Any, packed: bool) -> list[str]:
    """What the rotary embedding of a model (or decoder) does wrong in such a call; each entry says what to change.

    Nothing is read from the device unless the row is longer than the model's limit.
    """
    tokens = position_ids if position_ids is not None else input_ids
    if tokens is None or not paddle.in_dynamic_mode():
        return []
    for cls in type(model).__mro__:
        parts = cls.__module__.split(".")
        if parts[:2] == ["paddlenlp", "transformers"] and parts[2:3] and parts[2] in _FAMILIES:
            return _FAMILIES[parts[2]](model, position_ids, tokens.shape[-1], packed)
    return []
