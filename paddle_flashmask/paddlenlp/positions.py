"""Where rotary embeddings fail packed rows: positions that a table has not, or factors that depend on the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

__all__ = ["check_positions", "rotary_trouble"]


def _beyond(name: str, limit: int, position_ids: Any, length: int) -> list[str]:
    """Positions that start again in each sample may fit although the row is longer, so they are looked at then."""
    reached = length if position_ids is None else int(position_ids.max()) + 1
    if reached <= limit:
        return []
    return [
        f"position_ids reach {reached - 1}, but {name} has a table of {limit} positions and would read behind it: "
        f"leave out samples of more than {limit} tokens, or cut them"
    ]


def _llama_table(model: Any) -> tuple[str, int, bool] | None:
    """What its embedding is called, how many positions the table has, and whether it is made anew for longer rows."""
    attention = model.layers[0].self_attn if len(model.layers) else None
    embedding = getattr(attention, "rotary_emb", None)
    table = getattr(embedding, "cos_cached", None)  # [1, positions, 1, dim]; other strategies have none
    if table is None:
        return None
    name = type(embedding).__name__
    return name, table.shape[1], name == "LlamaDynamicNTKScalingRotaryEmbedding"


def _llama(model: Any, position_ids: Any, length: int, packed: bool) -> list[str]:
    found = _llama_table(model)
    if found is None or length <= found[1]:
        return []
    name, limit, grows = found
    if grows:
        if not packed:
            return []  # it grows with the row, as it is meant to
        return [
            f'rope_scaling_type="dynamic_ntk" scales the positions of all samples by the length of the row, here '
            f"{length}, beyond max_position_embeddings={limit}: pack rows of at most that many tokens, or "
            'take rope_scaling_type="ntk" or "linear"'
        ]
    return _beyond(name, limit, position_ids, length)


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
    family = _family(model)
    return _FAMILIES[family](model, position_ids, tokens.shape[-1], packed) if family in _FAMILIES else []


def _family(layer: Any) -> str | None:
    """The folder of PaddleNLP that the layer's class, or one that it is derived from, comes from."""
    for cls in type(layer).__mro__:
        parts = cls.__module__.split(".")
        if parts[:2] == ["paddlenlp", "transformers"] and len(parts) > 2 and parts[2] in _FAMILIES:
            return parts[2]
    return None


def check_positions(model: Any, longest_sample: int) -> None:
    """Check, before training, that a model's rotary table has a place for each token of the longest sample.

    Rows may be longer: positions start again in each sample. While the routing is on, a batch with positions beyond the
    table raises in the model's forward; this says so before the first step.

    Args:
        model: a model, or a LoRA or other wrapper of one. Models whose embeddings grow with the positions always pass.
        longest_sample: tokens; ``longest_sample`` of a ``PackedDataset`` or ``PreferenceDataset``.

    Raises:
        ValueError: the table (Llama, ChatGLM2) is shorter; PaddleNLP would read behind it.
    """
    for layer in model.sublayers(include_self=True):
        family = _family(layer)
        if family == "llama" and hasattr(layer, "layers"):
            found = _llama_table(layer)
            name, limit, grows = found if found is not None else ("", 0, True)
        elif family == "chatglm_v2" and hasattr(layer, "config"):
            name, limit, grows = "config.max_sequence_length", layer.config.max_sequence_length, False
        else:
            continue
        if not grows and longest_sample > limit:
            raise ValueError(
                f"longest_sample must be at most the {limit} positions of {name} in {type(model).__name__}, got "
                f"{longest_sample}: leave such samples out (a smaller max_length does), or take another model"
            )
        return
