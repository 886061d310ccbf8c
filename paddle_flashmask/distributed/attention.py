"""Attention over a sequence of which each worker holds a part.

Each worker keeps its queries, gathers the keys and values of all, and computes its two chunks of rows. Row indices are
known whole to every worker (a few integers a token): a chunk's are the same intervals, counted from its first row and
cut to its length, which the kernels do themselves. So nothing of the mask is lost, whatever it is, and tiles that it
hides are skipped as ever. In the backward pass gradients of keys and values are summed over the workers, in float32.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist

from .. import _amp, _checks
from ..functional import flashmask_attention
from ..masks import validate, window_indices
from ..masks._form import has_lower_end
from .shards import Worker, gathered, in_order, part_of, this_worker

TOKENS = 1  # the axis of query, key and value


class _GatherKeys(paddle.autograd.PyLayer):
    """Keys and values of the whole sequence; gradients are summed over the workers.

    One layer for both: every worker communicates in the same order then, whatever autograd does first.
    """

    @staticmethod
    def forward(ctx: Any, key: Any, value: Any, worker: Worker, group: Any | None) -> tuple[Any, Any]:
        ctx.worker, ctx.group = worker, group
        ctx.wanted = (not key.stop_gradient, not value.stop_gradient)
        key, value = (in_order(gathered(part, worker, group), TOKENS) for part in (key, value))
        return key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any | None, ...]:
        return tuple(  # Paddle wants None for an input without a gradient
            _sum_of_part(gradient, ctx.worker, ctx.group) if wanted else None
            for gradient, wanted in zip(gradients, ctx.wanted, strict=True)
        )


class _Halves(paddle.autograd.PyLayer):
    """A worker's two chunks of rows. (Paddle's own gradients of split and concat know no bfloat16 on CPUs.)"""

    @staticmethod
    def forward(ctx: Any, rows: Any) -> tuple[Any, Any]:
        early, late = paddle.split(rows, 2, axis=TOKENS)
        return early, late

    @staticmethod
    def backward(ctx: Any, early: Any, late: Any) -> Any:
        return paddle.concat([early, late], axis=TOKENS)


class _Joined(paddle.autograd.PyLayer):
    """The opposite."""

    @staticmethod
    def forward(ctx: Any, early: Any, late: Any) -> Any:
        return paddle.concat([early, late], axis=TOKENS)

    @staticmethod
    def backward(ctx: Any, rows: Any) -> tuple[Any, Any]:
        early, late = paddle.split(rows, 2, axis=TOKENS)
        return early, late


def _sum_of_part(gradient: Any, worker: Worker, group: Any | None) -> Any:
    """This worker's part of the sum over all workers, added in float32, in the dtype of `gradient`."""
    whole = gradient.astype("float32")
    if dist.get_backend(group).lower() == "nccl":
        parts = [part_of(whole, Worker(rank, worker.workers), TOKENS) for rank in range(worker.workers)]
        part = paddle.empty_like(parts[0])
        dist.reduce_scatter(part, parts, group=group)
    else:  # Gloo has no reduce_scatter
        dist.all_reduce(whole, group=group)
        part = part_of(whole, worker, TOKENS)
    return part.astype(gradient.dtype)


def row_intervals(indices: Any | None, causal: bool, batch: int, seqlen: int) -> Any | None:
    """The mask of a sequence in the form that holds all: int32 `[batch, mask_heads, seqlen, 4]`, without `causal`.

    Between 0 and seqlen. None: nothing is masked.
    """
    key = paddle.arange(0, seqlen, dtype="int32").reshape([1, 1, -1])
    if indices is None:
        if not causal:
            return None
        begin = start = end = paddle.zeros([batch, 1, seqlen], "int32")
        stop = key.expand_as(start)
    else:
        n = indices.shape[3]
        start = indices[..., 0]
        end = indices[..., 1] if has_lower_end(n, causal) else paddle.full_like(start, seqlen)
        begin = indices[..., 2] if n == 4 else paddle.zeros_like(start)
        stop = key.expand_as(start) if causal else indices[..., n - 1]
    # Clipped before anything is subtracted: whatever users write for "never" must not wrap around.
    return paddle.clip(paddle.stack([start, end, begin, stop], axis=-1), 0, seqlen)


def context_parallel_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    return_softmax_lse: bool = False,
    deterministic: bool | None = None,
    group: Any | None = None,
) -> paddle.Tensor | list[paddle.Tensor]:
    """`flashmask_attention` over a sequence that is spread over the workers of a group, as `split_sequence` does it.

    Every worker calls it at the same time, with its part of query, key and value and with the mask of the whole
    sequence. Output, softmax_lse and the gradient of query are computed by the same kernels from the same numbers as on
    one worker. Gradients of key and value are sums over the workers. Dynamic mode only; dropout and block masks are not
    offered.

    Beside its part each worker holds the keys and values of the whole sequence, until its backward pass has used them
    (recompute frees them sooner), and while that runs their gradients in float32.

    Args:
        query: `[batch, seqlen / workers, heads_q, head_dim]`, this worker's part; an even number of tokens.
        key: `[batch, seqlen / workers, heads_k, head_dim]`, likewise.
        value: `[batch, seqlen / workers, heads_k, head_dim_v]`, likewise.
        startend_row_indices: int32 `[batch, mask_heads, seqlen, n]` as for `flashmask_attention`, of the whole
            sequence: rows and keys are counted from its beginning. The same on every worker.
        causal: also mask rows `i < j`, counted so.
        window_size: a sliding window instead of startend_row_indices, as for `flashmask_attention`.
        softmax_scale: factor of the scores, finite; None is `head_dim ** -0.5`.
        return_softmax_lse: also return the log-sum-exp of the scaled scores of each row.
        deterministic: as for `flashmask_attention`; the sum over workers is not covered by it.
        group: the workers, a group of paddle.distributed; None for all.

    Returns:
        The output `[batch, seqlen / workers, heads_q, head_dim_v]` of this worker's tokens; with `return_softmax_lse` a
        list of it and softmax_lse, float32 `[batch, heads_q, seqlen / workers]`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Arguments that differ between workers
            are not noticed.
        RuntimeError: a static program is being built.
    """
    if not paddle.in_dynamic_mode():
        raise RuntimeError("context_parallel_attention: expected dynamic mode, but a static program is being built")
    for name, given in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(name, given)
    if startend_row_indices is not None:
        _checks.tensor("startend_row_indices", startend_row_indices)
    causal = _checks.boolean("causal", causal)
    return_softmax_lse = _checks.boolean("return_softmax_lse", return_softmax_lse)
    query, key, value = _amp.cast(query, key, value)
    _checks.qkv_dtypes(query, key, value)
    _checks.qkv_sizes(query, key, value)
    (batch, tokens, heads_q, _), (_, tokens_k, heads_k, _) = query.shape, key.shape
    if tokens != tokens_k or tokens % 2:
        raise ValueError(
            "query.shape[1], key.shape[1]: expected the same even number of tokens, this worker's part, got "
            f"{tokens} and {tokens_k}"
        )
    worker = this_worker(group)
    seqlen = tokens * worker.workers
    validate(
        startend_row_indices,
        causal,
        batch=batch,
        heads_q=heads_q,
        heads_k=heads_k,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        window_size=window_size,
    )
    if window_size is not None:
        bounds, causal = window_indices(window_size, seqlen, seqlen, causal, batch, 1)
        startend_row_indices = None if bounds is None else paddle.to_tensor(bounds, place=query.place)
    options = {"softmax_scale": softmax_scale, "return_softmax_lse": True, "deterministic": deterministic}
    if worker.workers == 1:
        out, lse = flashmask_attention(query, key, value, startend_row_indices, causal=causal, **options)
        return [out, lse] if return_softmax_lse else out
    all_keys, all_values = _GatherKeys.apply(key, value, worker, group)
    intervals = row_intervals(startend_row_indices, causal, batch, seqlen)
    length = seqlen // (2 * worker.workers)
    results = []
    for rows, number in zip(_Halves.apply(query), worker.chunks, strict=True):
        of_rows = None if intervals is None else intervals - number * length
        results.append(flashmask_attention(rows, all_keys, all_values, of_rows, causal=False, **options))
    out = _Joined.apply(*(out for out, _ in results))
    return [out, paddle.concat([lse for _, lse in results], axis=2)] if return_softmax_lse else out
