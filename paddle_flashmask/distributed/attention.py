"""Attention over a sequence of which each worker holds a part.

Each worker keeps its queries, gathers the keys and values of all, and computes its two chunks of rows. Row indices are
known whole to every worker (a few integers a token): a chunk's are the same intervals, counted from its first row and
cut to its length, which the kernels do themselves. Under the causal mask a chunk is called with the keys up to its own
last one: the last query stands beside the last key then, as the causal mask wants it. So nothing of the mask is lost,
whatever it is, and tiles that it hides are skipped as ever.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist

from .. import _amp, _checks
from ..functional import flashmask_attention
from ..masks import validate, window_indices
from .shards import Worker, entry, gathered, in_order, part_of, piece, span, this_worker

TOKENS = 1  # the axis of query, key and value


class _GatherKeys(paddle.autograd.PyLayer):
    """The keys or values of all workers, for each of two chunks of queries the first ones, as many as it needs.

    For one operand: Paddle's layers of several do not go with paddle.grad for some of them. All workers record the same
    layers in the same order, and so communicate in one order in the backward pass, too.
    """

    @staticmethod
    def forward(ctx: Any, part: Any, worker: Worker, group: Any | None, needed: tuple[int, int]) -> tuple[Any, Any]:
        whole = in_order(gathered(part, worker, group), TOKENS)
        ctx.worker, ctx.group, ctx.seqlen = worker, group, whole.shape[TOKENS]
        # Each by a call of its own, also where both are all keys: of one tensor that is returned twice Paddle would add
        # the gradients itself, before they are float32.
        early, late = (span(whole, TOKENS, 0, tokens) for tokens in needed)
        return early, late

    @staticmethod
    def backward(ctx: Any, early: Any, late: Any) -> Any:
        """The shares of both chunks and of all workers are added in float32."""
        with paddle.amp.auto_cast(enable=False):
            whole = _in_float32(early, ctx.seqlen) + _in_float32(late, ctx.seqlen)
            return _sum_of_part(whole, ctx.worker, ctx.group).astype(late.dtype)


def _in_float32(gradient: Any, seqlen: int) -> Any:
    """With zeros for the keys behind it, up to `seqlen`."""
    batch, tokens, heads, dim = gradient.shape
    gradient = gradient.astype("float32")
    if tokens == seqlen:
        return gradient
    return paddle.concat([gradient, paddle.zeros([batch, seqlen - tokens, heads, dim], "float32")], axis=TOKENS)


def _sum_of_part(whole: Any, worker: Worker, group: Any | None) -> Any:
    """This worker's part of the sum of all workers' `whole`, which may be overwritten."""
    if dist.get_backend(group).lower() == "nccl":
        workers = worker.workers
        chunks = [chunk for rank in range(workers) for chunk in Worker(rank, workers).chunks]
        pieces = paddle.stack([piece(whole, TOKENS, chunk, 2 * workers) for chunk in chunks])
        sums = paddle.empty([2, *pieces.shape[1:]], pieces.dtype)
        dist.stream.reduce_scatter(sums, pieces, group=group)
        return paddle.concat([entry(sums, place) for place in range(2)], axis=TOKENS)
    dist.all_reduce(whole, group=group)  # Gloo has no reduce_scatter
    return part_of(whole, worker, TOKENS)


class _Halves(paddle.autograd.PyLayer):
    """A worker's two chunks of rows. (Paddle's own gradients of split and concat know no bfloat16 on CPUs.)"""

    @staticmethod
    def forward(ctx: Any, rows: Any) -> tuple[Any, Any]:
        return piece(rows, TOKENS, 0, 2), piece(rows, TOKENS, 1, 2)

    @staticmethod
    def backward(ctx: Any, early: Any, late: Any) -> Any:
        with paddle.amp.auto_cast(enable=False):
            return paddle.concat([early, late], axis=TOKENS)


class _Joined(paddle.autograd.PyLayer):
    """The opposite."""

    @staticmethod
    def forward(ctx: Any, early: Any, late: Any) -> Any:
        return paddle.concat([early, late], axis=TOKENS)

    @staticmethod
    def backward(ctx: Any, rows: Any) -> tuple[Any, Any]:
        with paddle.amp.auto_cast(enable=False):
            return piece(rows, TOKENS, 0, 2), piece(rows, TOKENS, 1, 2)


def chunk_indices(indices: Any | None, seqlen: int, first: int, keys: int) -> Any | None:
    """The row indices of the rows from `first` on, counted from there, for the first `keys` keys.

    They may lie outside of the chunk's rows, and are clipped to them by whoever reads them.
    """
    if indices is None:
        return None
    # Clipped before anything is subtracted: whatever users write for "never" must not wrap around.
    return paddle.clip(indices[:, :, :keys], 0, seqlen) - first


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
    sequence; and every worker runs the same backward pass (once), or the others wait for it. Gradients of key and value
    are sums over the workers: of shares in the operands' dtype, added in float32. Dynamic mode only; dropout and block
    masks are not offered.

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
        group: the workers, a group of paddle.distributed; None for all there are, those of other axes of parallelism
            among them.

    Returns:
        The output `[batch, seqlen / workers, heads_q, head_dim_v]` of this worker's tokens; with `return_softmax_lse` a
        list of it and softmax_lse, float32 `[batch, heads_q, seqlen / workers]`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Arguments that differ between workers
            are not noticed.
        RuntimeError: a static program is being built; or several workers were launched, but paddle.distributed is not
            set up.
    """
    if not paddle.in_dynamic_mode():
        raise RuntimeError("context_parallel_attention: expected dynamic mode, but a static program is being built")
    # All that can be wrong is looked at before the first communication: after an error on one worker the others wait.
    for name, given in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(name, given)
    if startend_row_indices is not None:
        _checks.tensor("startend_row_indices", startend_row_indices)
    causal = _checks.boolean("causal", causal)
    return_softmax_lse = _checks.boolean("return_softmax_lse", return_softmax_lse)
    if deterministic is not None:
        deterministic = _checks.boolean("deterministic", deterministic)
    if softmax_scale is not None:
        softmax_scale = _checks.softmax_scale(softmax_scale)
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
    try:
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
    except ValueError as error:
        whole = f"the mask is that of the whole sequence, {worker.workers} workers' {tokens} tokens each"
        raise ValueError(f"{error} ({whole})") from None
    _checks.same_device(query, {"key": key, "value": value, "startend_row_indices": startend_row_indices})
    _checks.dtype_on_gpu(query)
    if window_size is not None:
        bounds, causal = window_indices(window_size, seqlen, seqlen, causal, batch, 1)
        startend_row_indices = None if bounds is None else paddle.to_tensor(bounds, place=query.place)

    options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "deterministic": deterministic}
    with paddle.amp.auto_cast(enable=False):
        if worker.workers == 1:
            options["return_softmax_lse"] = return_softmax_lse
            return flashmask_attention(query, key, value, startend_row_indices, **options)
        length = tokens // 2
        firsts = [chunk * length for chunk in worker.chunks]
        needed = tuple(first + length if causal else seqlen for first in firsts)
        chunks = zip(
            _Halves.apply(query),
            _GatherKeys.apply(key, worker, group, needed),
            _GatherKeys.apply(value, worker, group, needed),
            firsts,
            needed,
            strict=True,
        )
        results = [
            flashmask_attention(
                *operands, chunk_indices(startend_row_indices, seqlen, first, keys), return_softmax_lse=True, **options
            )
            for *operands, first, keys in chunks
        ]
        out = _Joined.apply(*(out for out, _ in results))
        return [out, paddle.concat([lse for _, lse in results], axis=2)] if return_softmax_lse else out
