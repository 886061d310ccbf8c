"""The attention call that PaddleNLP's models share, routed through this package's FlashMask.

Llama, Qwen2, Qwen2-MoE, DeepSeek-V2 and DeepSeek-V3 look up ``paddlenlp.transformers.llama.fusion_ops``'
``fusion_flash_attention`` each time they attend. Replacing that one attribute reaches every model, built before or
after.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F

from paddle_flashmask.functional import flashmask_attention

from .patching import stands_in_for
from .switch import row_indices_are_missed
from .watch import report_call

__all__ = ["as_startend_row_indices", "drops_dense_mask", "refuse_split_heads", "route"]

logger = logging.getLogger(__name__)

# Devices whose attention PaddleNLP calls through Paddle's own functional API; the others have private kernels.
ROUTED_DEVICES = ("cpu", "gpu")


@functools.cache
def drops_dense_mask() -> bool:
    """Whether this Paddle's ``scaled_dot_product_attention(attn_mask=..., is_causal=True)`` ignores ``attn_mask``.

    PaddleNLP calls it that way. Paddle 3.3's documentation says that the mask is ignored then; earlier versions applied
    it. Measured on two tokens rather than read off the version, on the CPU.
    """
    with paddle.base.dygraph.guard(paddle.CPUPlace()), paddle.no_grad():
        query = paddle.zeros([1, 2, 1, 8], dtype="float32")
        value = paddle.to_tensor([0.0, 1.0]).reshape([1, 2, 1, 1]).expand([1, 2, 1, 8])
        hide_first = paddle.to_tensor([[0.0, -1e30], [-1e30, 0.0]]).reshape([1, 1, 2, 2])
        out = F.scaled_dot_product_attention(query, query, value, attn_mask=hide_first, is_causal=True)
        return float(out[0, 1, 0, 0]) < 0.75  # 1.0 if the mask is applied, 0.5 if it is dropped


def as_startend_row_indices(
    row_indices: paddle.Tensor, batch: int, query_length: int, key_length: int, key_heads: int, query_heads: int
) -> tuple[paddle.Tensor, bool]:
    """PaddleNLP's row indices in the form that ``flashmask_attention`` takes.

    Args:
        row_indices: ``[b, s_k]`` or ``[b, h, s_k]`` (one column, causal: the first masked row of each key), or
            ``[b, h, s_k, n]`` with n of 1, 2 (causal) or 4 (not causal). Integers; b may be 1, h is 1, the number of
            key heads or the number of query heads.
        batch: batch size of the call.
        query_length: number of queries of the call.
        key_length: number of keys of the call.
        key_heads: number of key heads.
        query_heads: number of query heads.

    Returns:
        ``(startend_row_indices, causal)``: int32 ``[b, h, s_k, n]`` and whether the causal part is added.

    Raises:
        TypeError: not an integer tensor.
        ValueError: a shape that does not belong to this call.
    """
    name = "attn_mask_startend_row_indices"
    # Not isinstance: in a static program it is a paddle.pir.Value.
    kind = getattr(row_indices, "dtype", type(row_indices).__name__)
    if kind not in (paddle.int32, paddle.int64):
        raise TypeError(f"{name} must be an int32 tensor, got {kind}")
    shape = list(row_indices.shape)
    if row_indices.ndim == 2:
        row_indices = row_indices.unsqueeze(1)
    if row_indices.ndim == 3:
        row_indices = row_indices.unsqueeze(-1)
    if row_indices.ndim != 4:
        raise ValueError(f"{name} must have shape [b, s], [b, h, s] or [b, h, s, n], got {shape}")
    got_batch, heads, length, columns = row_indices.shape
    if got_batch not in (1, batch):
        raise ValueError(f"{name} must have batch size {batch} (or 1), got shape {shape}")
    if heads not in (1, key_heads, query_heads):
        raise ValueError(f"{name} must have 1, {key_heads} or {query_heads} heads, got shape {shape}")
    if length != key_length:
        raise ValueError(
            f"{name} must hold one entry for each of the {key_length} keys, got shape {shape}. Row indices do not go "
            "with a key-value cache, prefix tuning, or a sequence that is split over devices"
        )
    if query_length != key_length:
        raise ValueError(
            f"{name} need as many queries as keys, got {query_length} queries and {key_length} keys. They count rows "
            "from the first query of the call, and do not go with a key-value cache: use a dense attention_mask there"
        )
    if columns not in (1, 2, 4):
        raise ValueError(f"{name} must have 1, 2 or 4 entries in its last axis, got shape {shape}")
    if row_indices.dtype != paddle.int32:
        # Clipped first: an int64 "never" such as 2**40 must not wrap around to a small row.
        row_indices = row_indices.clip(-1, 2**31 - 1).astype("int32")
    if got_batch != batch:
        row_indices = row_indices.expand([batch, heads, length, columns])
    return row_indices, columns != 4


def _refuse_parallel(config: Any, reshard_layer: Any, what: str) -> None:
    if getattr(config, "context_parallel_degree", 1) > 1:
        raise ValueError(
            f"{what} with context_parallel_degree={config.context_parallel_degree}: PaddleNLP's ring attention is "
            "called without any mask and would train plain causal attention. Set context_parallel_degree=1"
        )
    if reshard_layer is not None or getattr(config, "sep_parallel_degree", 1) > 1:
        raise ValueError(
            f"{what} with sep_parallel_degree={getattr(config, 'sep_parallel_degree', 'unknown')}: PaddleNLP splits "
            "the mask along the sequence but attends over the whole sequence, and replaces the position ids. "
            "Set sep_parallel_degree=1"
        )


def refuse_split_heads(config: Any, row_indices: Any) -> None:
    """Refuse row indices per head under tensor parallelism: each device has some of the heads, but all of the rows."""
    shape = list(getattr(row_indices, "shape", ()))
    for name in ("tensor_parallel_degree", "tensor_model_parallel_size"):  # PaddleNLP's name and PaddleFormers'
        degree = getattr(config, name, None) or 1
        if degree > 1 and len(shape) > 2 and shape[1] > 1:
            raise ValueError(
                f"attn_mask_startend_row_indices must have 1 head with {name}={degree}, got shape {shape}: each device "
                f"attends with a part of the heads. Use one mask for all heads, or {name}=1"
            )


def _inputs_as_saved() -> tuple[str, ...]:
    """The inputs of ``flashmask_attention`` in the order in which Paddle's autograd saves them for a custom op.

    Refined recompute matches the tensors that a forward call saved with those of the recomputation by their order
    alone: with another order the gradients would read one input for another. The order is that of a hash map in Paddle,
    so it is looked at, not assumed.
    """
    names = ("query", "key", "value", "startend_row_indices")
    # The guard is for scripts that have switched to static programs.
    with paddle.base.dygraph.guard(), paddle.set_grad_enabled(True), paddle.amp.auto_cast(enable=False):
        tensors = {name: paddle.zeros([1, 8, 1, 8], dtype="float32") for name in names[:3]}
        tensors["startend_row_indices"] = paddle.full([1, 1, 8, 1], 8, dtype="int32")
        for name, tensor in tensors.items():
            tensor.name = f"flashmask_probe_{name}"
            tensor.stop_gradient = name == "startend_row_indices"
        saved: list[str] = []

        def pack(tensor: paddle.Tensor) -> paddle.Tensor:
            saved.append(tensor.name.removeprefix("flashmask_probe_"))
            return tensor

        with paddle.autograd.saved_tensors_hooks(pack, lambda tensor: tensor):
            flashmask_attention(**tensors, causal=True)
    order = tuple(name for name in saved if name in names)
    if sorted(order) != sorted(names):
        raise ImportError(
            f"Paddle {paddle.__version__} saves {order} for the gradient of flashmask_attention, expected each of "
            f"{names} once"
        )
    return order


def _in_saved_order(order: tuple[str, ...]) -> Callable[..., paddle.Tensor]:
    """``flashmask_attention`` with its tensors in ``order``: PaddleNLP's ``no_recompute`` goes by the signature."""

    def call(**arguments: Any) -> paddle.Tensor:
        return flashmask_attention(**arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword) for name in (*order, "causal")]
    )
    return call


@paddle.jit.not_to_static
def _note_dense_mask(query: paddle.Tensor) -> None:
    # Generation during evaluation rightly has a dense mask, but no gradient.
    if paddle.in_dynamic_mode() and not query.stop_gradient and row_indices_are_missed():
        logger.warning(
            "--flash_mask true, but a batch came with a dense attention_mask and without "
            "attn_mask_startend_row_indices: it trains with dense attention. "
            'Make the batches with row indices, for instance with PackingCollator(mask="flashmask")'
        )


def route(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build the replacement of ``fusion_ops.fusion_flash_attention``.

    Row indices go to ``flashmask_attention``. A dense mask goes to Paddle's attention in a way in which no version
    ignores it. Plain causal attention, and devices with kernels of their own, stay with ``original``.
    """
    fusion_ops: Any = sys.modules[original.__module__]
    attend = _in_saved_order(_inputs_as_saved())

    @stands_in_for(original)
    def fusion_flash_attention(
        query_states: paddle.Tensor,
        config: Any,
        key_states: paddle.Tensor,
        value_states: paddle.Tensor,
        attention_mask: paddle.Tensor | None,
        output_attentions: bool,
        alibi: paddle.Tensor | None = None,
        attn_mask_startend_row_indices: paddle.Tensor | None = None,
        sequence_parallel: bool = False,
        reshard_layer: Any = None,
        npu_is_casual: bool = False,
        skip_recompute: bool = False,
    ) -> Any:
        device = fusion_ops.get_env_device()
        routed = device in ROUTED_DEVICES
        if attn_mask_startend_row_indices is not None:
            _refuse_parallel(config, reshard_layer, "attn_mask_startend_row_indices")
            if alibi is not None:
                raise ValueError(
                    "attn_mask_startend_row_indices cannot be combined with alibi: "
                    "use a model with rotary positions, or a dense attention_mask with use_flash_attention=False"
                )
            if not routed:
                raise ValueError(
                    f"attn_mask_startend_row_indices on device {device!r}: PaddleNLP ignores them there. "
                    f"Use one of {', '.join(ROUTED_DEVICES)}, or a dense attention_mask"
                )
            refuse_split_heads(config, attn_mask_startend_row_indices)
            batch, query_length, query_heads, _ = query_states.shape
            _, key_length, key_heads, _ = key_states.shape
            indices, causal = as_startend_row_indices(
                attn_mask_startend_row_indices, batch, query_length, key_length, key_heads, query_heads
            )
            out = fusion_ops.no_recompute(
                attend,
                query=query_states,
                key=key_states,
                value=value_states,
                startend_row_indices=indices,
                causal=causal,
                enable=skip_recompute,
            )
            report_call(query_states, key_states, value_states, attn_mask_startend_row_indices, out)
        elif attention_mask is not None and routed:
            _refuse_parallel(config, reshard_layer, "A dense attention_mask")
            _note_dense_mask(query_states)
            if alibi is not None:
                bias = alibi.reshape([query_states.shape[0], query_states.shape[2], 1, -1])
                attention_mask = attention_mask.astype(bias.dtype) + bias
            # The models' dense masks already hold the causal part; with is_causal=True Paddle 3.3 would drop the mask.
            out = fusion_ops.no_recompute(
                F.scaled_dot_product_attention,
                query_states,
                key_states,
                value_states,
                attn_mask=attention_mask,
                is_causal=False,
                enable=skip_recompute,
            )
        else:
            return original(
                query_states,
                config,
                key_states,
                value_states,
                attention_mask,
                output_attentions,
                alibi,
                attn_mask_startend_row_indices,
                sequence_parallel,
                reshard_layer,
                npu_is_casual,
                skip_recompute,
            )

        batch, length, heads, head_dim = out.shape
        merged = [batch * length] if sequence_parallel else [batch, length]
        out = out.reshape([*merged, heads * head_dim])
        return (out, None) if output_attentions else out

    return fusion_flash_attention
