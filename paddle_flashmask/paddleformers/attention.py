"""The attention function that PaddleFormers' models call, and its registration."""

from __future__ import annotations

from typing import Any

import paddle

from paddle_flashmask.functional import flashmask_attention
from paddle_flashmask.paddlenlp.routing import as_startend_row_indices, refuse_split_heads

__all__ = ["NAME", "flashmask_custom_forward", "register"]

NAME = "flashmask_custom"
"""The name to give as ``_attn_implementation``."""

_ROWS = "attn_mask_startend_row_indices"


def flashmask_custom_forward(
    module: Any,
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attention_mask: paddle.Tensor | None = None,
    attn_mask_startend_row_indices: paddle.Tensor | None = None,
    dropout: float = 0.0,
    sink: paddle.Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Attention under row indices, in the form in which PaddleFormers' layers call it.

    Args:
        module: the attention layer; ``module.training`` switches dropout, ``module.is_causal`` (True if there is none)
            says what no mask at all means.
        query: ``[b, heads_q, s_q, d]``.
        key: ``[b, heads_k, s_k, d]``; not repeated for grouped heads.
        value: ``[b, heads_k, s_k, d_v]``.
        attention_mask: a dense mask to add, ``[b, 1, s_q, s_k]``. Computed densely, by PaddleFormers' eager attention.
        attn_mask_startend_row_indices: int32 ``[b, h, s_k]`` or ``[b, h, s_k, n]``. n = 1 is causal, n = 4 is not;
            n = 2 is causal unless ``is_causal`` is False, as in PaddleFormers' own ``flashmask``.
        dropout: probability of dropping an attention weight.
        sink: not supported.
        scaling: factor of the scores; None is ``d ** -0.5``.
        is_causal: overrides ``module.is_causal`` where there is no mask.
        **kwargs: ignored, as PaddleFormers' own implementations do.

    Returns:
        The output ``[b, s_q, heads_q * d_v]``, and None for the weights (the weights, with a dense mask).

    Raises:
        TypeError, ValueError: row indices of a wrong dtype or shape, row indices beside a dense mask, a sink, or
            ``is_causal`` against the number of columns, rows per head under tensor parallelism, or other than as many
            queries as keys (a key-value cache).
    """
    if sink is not None:
        raise ValueError(f"sink with {NAME}: attention sinks are not supported. Use _attn_implementation=eager")
    rows = attn_mask_startend_row_indices
    if attention_mask is not None:
        if rows is not None:
            raise ValueError(f"{_ROWS} and attention_mask: {NAME} can follow one of them, not both")
        from paddleformers.nn.attention.eager_attention import eager_attention_forward

        out = eager_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        )
        return out

    query, key, value = (tensor.transpose([0, 2, 1, 3]) for tensor in (query, key, value))
    batch, query_length, query_heads, _ = query.shape
    _, key_length, key_heads, _ = key.shape
    if rows is None:
        causal = is_causal if is_causal is not None else query_length > 1 and getattr(module, "is_causal", True)
    else:
        refuse_split_heads(getattr(module, "config", None), rows)
        rows, causal = as_startend_row_indices(rows, batch, query_length, key_length, key_heads, query_heads)
        columns = rows.shape[-1]
        if is_causal is not None and columns != 2 and is_causal != causal:
            raise ValueError(f"is_causal={is_causal}: {_ROWS} with {columns} columns are for is_causal={causal}")
        if columns == 2 and is_causal is not None:
            causal = is_causal
    out = flashmask_attention(
        query,
        key,
        value,
        rows,
        causal=bool(causal),
        dropout=dropout,
        training=module.training,
        softmax_scale=scaling,
    )
    return out.flatten(start_axis=2), None


def register() -> str:
    """Make ``flashmask_custom`` an attention implementation of PaddleFormers, in this process. Returns that name.

    Calling it again does nothing more. Existing models follow when their configuration names it.

    Raises:
        ImportError: PaddleFormers is missing, or has no registry of attention functions.
    """
    try:
        from paddleformers.nn.attention.interface import AttentionInterface

        add = AttentionInterface.register
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"paddle_flashmask.paddleformers needs PaddleFormers 1.2 ({error}): pip install "
            "'paddle-flashmask[paddleformers]'"
        ) from error
    add(NAME, flashmask_custom_forward)
    return NAME
