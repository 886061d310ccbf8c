"""The attention call. Its signature and return values are those of `paddle.nn.functional.flashmask_attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle

from . import _amp, _checks, _op
from ._dropout import draw_seed_offset
from ._window import window_bounds
from .masks import validate

__all__ = ["flashmask_attention"]


def _deterministic(value: Any) -> bool:
    if value is not None:
        return _checks.boolean("deterministic", value)
    try:
        return bool(paddle.get_flags(["FLAGS_cudnn_deterministic"])["FLAGS_cudnn_deterministic"])
    except ValueError:  # builds without CUDA have no such flag
        return False


def _one_paddle_call(function: Any) -> Any:
    """Lets to_static take the function as it takes Paddle's own: not translated, not broken up."""
    try:
        from paddle.jit.marker import unified
    except ImportError:  # before Paddle 3.2
        return paddle.jit.not_to_static(function)
    return unified(function)


@_one_paddle_call
def flashmask_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    block_mask: paddle.Tensor | None = None,
    deterministic: bool | None = None,
) -> Any:
    """Attention, `softmax(softmax_scale * Q K^T + mask) V`, under a mask of up to two row intervals per key.

    FlashMask: Wang et al., arXiv 2410.01359. Memory is linear in the sequence lengths, but for 2 bits per pair of tiles
    (of 64 rows and columns or more) on a GPU while a masked call runs. Tiles of the score matrix that are masked as a
    whole are skipped. A query that sees no key gets output 0, `lse` -inf and zero gradients. `key` and `value` must be
    finite also where no query sees them: as under a dense mask, a weight of zero times NaN is NaN.

    Differentiable in query, key and value, once: a second derivative raises. `softmax_lse` and the mask
    carry no gradient. Works in dynamic mode, under `paddle.jit.to_static`, in static programs and under recompute.
    Where `paddle.amp.auto_cast` is on, the inputs are cast as those of Paddle's `flash_attn` (an op of the white list).

    Args:
        query: `[batch, seqlen_q, heads_q, head_dim]`, float32, bfloat16 or float16; on a GPU the latter two. head_dim
            is a multiple of 8 and at most 256.
        key: `[batch, seqlen_k, heads_k, head_dim]`, dtype of query. heads_k divides heads_q; query head `h` reads key
            head `h // (heads_q / heads_k)`.
        value: `[batch, seqlen_k, heads_k, head_dim_v]`, dtype of query. head_dim_v may differ from head_dim, with the
            same limits.
        startend_row_indices: int32 `[batch, mask_heads, seqlen_k, n]`, mask_heads one of 1, heads_k, heads_q; or None
            for no mask but the causal one. Column j holds the half-open intervals of query rows that may not see key j:

            | n | causal | last axis          | masked rows                            |
            |---|--------|--------------------|----------------------------------------|
            | 1 | True   | LTS                | `[LTS, seqlen_q)` and the causal part  |
            | 2 | True   | LTS, LTE           | `[LTS, LTE)` and the causal part       |
            | 2 | False  | LTS, UTE           | `[LTS, seqlen_q)` and `[0, UTE)`       |
            | 4 | False  | LTS, LTE, UTS, UTE | `[LTS, LTE)` and `[UTS, UTE)`          |

            Values are clipped to [0, seqlen_q]; an interval with start >= end is empty. `paddle_flashmask.masks` builds
            them.
        dropout: probability of dropping an attention weight, 0 to 1, in steps of 2^-16; kept weights are scaled up.
            Used only if `training`.
        causal: also mask rows `i < j - (seqlen_k - seqlen_q)`: the last query is aligned with the last key.
        window_size: sliding window `(left, right)`, or one integer for both: a query sees the keys from `left` before
            its own to `right` after it; -1 is unbounded, and with `causal` right is 0. Excludes `startend_row_indices`.
        return_softmax_lse: also return the log-sum-exp of the scaled scores of each row.
        return_seed_offset: also return the two numbers that dropout was keyed with.
        fixed_seed_offset: int64 `[2]`, (seed, offset) for dropout, on any device. None draws them from Paddle's
            generator, which `paddle.seed` sets.
        rng_name: name of an RNG state of fleet's tracker to draw them from (dynamic mode only).
        training: False turns dropout off.
        name: accepted for the sake of the signature; not used.
        softmax_scale: factor of the scores, finite; None is `head_dim ** -0.5`.
        block_mask: int32 `[batch, mask_heads, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]`; 0 masks a block of
            128 x 128 scores on top of everything else. mask_heads as in `startend_row_indices` if both are given.
        deterministic: bitwise repeatable gradients on a GPU too (on a CPU they always are). None follows
            FLAGS_cudnn_deterministic.

    Returns:
        The output `[batch, seqlen_q, heads_q, head_dim_v]` in the dtype of query; or, if anything else was asked for, a
        list of it, then softmax_lse float32 `[batch, heads_q, seqlen_q]` (natural logarithm) with `return_softmax_lse`,
        then seed_offset int64 `[2]` with `return_seed_offset` (zeros if nothing is dropped and none was given).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong rank, size, value, device or combination. Both name the argument, what was expected and what
            came. Sizes that are unknown while a static program is built are checked when it runs.
        NotImplementedError: the library was built without a kernel for the device, dtype or head dim.
        MemoryError, OSError: no memory, or an error of the device. (In Paddle 2.6, NotImplementedError and MemoryError
            are OSError or RuntimeError, too.)
    """
    for argument, given in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(argument, given)
    for argument, given in (("startend_row_indices", startend_row_indices), ("block_mask", block_mask)):
        if given is not None:
            _checks.tensor(argument, given)
    causal = _checks.boolean("causal", causal)
    training = _checks.boolean("training", training)
    return_softmax_lse = _checks.boolean("return_softmax_lse", return_softmax_lse)
    return_seed_offset = _checks.boolean("return_seed_offset", return_seed_offset)
    deterministic = _deterministic(deterministic)
    rng_name = _checks.string("rng_name", rng_name)
    if name is not None:
        _checks.string("name", name)
    probability = _checks.dropout(dropout)
    if fixed_seed_offset is not None:
        _checks.seed_offset(fixed_seed_offset)

    query, key, value = _amp.cast(query, key, value)
    _checks.qkv_dtypes(query, key, value)
    sizes = _checks.qkv_sizes(query, key, value)
    validate(
        startend_row_indices,
        causal,
        batch=sizes.batch,
        heads_q=sizes.heads_q,
        heads_k=sizes.heads_k,
        seqlen_q=sizes.seqlen_q,
        seqlen_k=sizes.seqlen_k,
        block_mask=block_mask,
        window_size=window_size,
    )
    others = {"key": key, "value": value, "startend_row_indices": startend_row_indices, "block_mask": block_mask}
    _checks.same_device(query, others)
    _checks.dtype_on_gpu(query)
    if softmax_scale is None:
        if sizes.head_dim is None:
            raise ValueError("query.shape[3]: expected a known head dim where softmax_scale is None, got -1")
        scale = 1.0 / math.sqrt(sizes.head_dim)
    else:
        scale = _checks.softmax_scale(softmax_scale)

    if window_size is not None:
        startend_row_indices, causal = window_bounds(window_size, query, key, block_mask, sizes, causal)
    if not training:
        probability = 0.0
    seed_offset = fixed_seed_offset
    if probability > 0.0 and seed_offset is None:
        seed_offset = draw_seed_offset(rng_name)

    used_seed_offset = seed_offset if probability > 0.0 else None
    out, lse = _op.run(
        query,
        key,
        value,
        startend_row_indices,
        block_mask,
        used_seed_offset,
        causal,
        float(np.float32(scale)),
        probability,
        deterministic,
    )
    lse.stop_gradient = True
    outputs = [out]
    if return_softmax_lse:
        outputs.append(lse)
    if return_seed_offset:
        outputs.append(paddle.zeros([2], dtype="int64") if seed_offset is None else seed_offset)
    return outputs if len(outputs) > 1 else out
