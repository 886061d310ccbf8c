"""What the kernels must compute, written for reading: float64, dense, NumPy only.

Layouts: q, out, dout [b, s_q, h_q, d or d_v]; k, v [b, s_k, h_k, d or d_v]; visible, keep [b, h, s_q, s_k] bool.
Query head h reads key head h // (h_q / h_k); a mask with 1 or h_k heads is shared by the query heads in the same way.
"""

from __future__ import annotations

import numpy as np

INT32 = np.iinfo(np.int32)


def per_query_head(array: np.ndarray, heads_q: int, axis: int) -> np.ndarray:
    """Repeats the heads on `axis` (1, h_k or h_q of them) so that there is one for each query head."""
    heads = array.shape[axis]
    assert heads_q % heads == 0, f"{heads} heads cannot serve {heads_q} query heads"
    return array.repeat(heads_q // heads, axis=axis)


def attention(q, k, v, visible, scale, keep=None, keep_scale=1.0):
    """softmax(scale * q k^T over the visible keys) v.

    Returns out [b, s_q, h_q, d_v] and lse [b, h_q, s_q], the natural logarithm of the softmax denominator. A row that
    sees nothing has out 0 and lse -inf. Dropout acts on the probabilities, after lse: kept ones times `keep_scale`.
    """
    p, lse = _probabilities(q, k, visible, scale)
    p = p if keep is None else p * keep * keep_scale
    return _heads_first(p @ _heads_first(v, q.shape[2])), lse


def attention_grads(q, k, v, visible, scale, dout, keep=None, keep_scale=1.0):
    """dq, dk, dv for the gradient `dout` of `out`, in the layouts of q, k, v."""
    heads_q, heads_k = q.shape[2], k.shape[2]
    p, _ = _probabilities(q, k, visible, scale)
    q, k, v, dout = (_heads_first(x, heads_q) for x in (q, k, v, dout))
    factor = 1.0 if keep is None else keep * keep_scale

    dv = (p * factor).swapaxes(2, 3) @ dout
    dp = (dout @ v.swapaxes(2, 3)) * factor
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
    return _heads_first(ds @ k), _sum_shared(ds.swapaxes(2, 3) @ q, heads_k), _sum_shared(dv, heads_k)


def _probabilities(q, k, visible, scale):
    heads_q = q.shape[2]
    visible = per_query_head(np.asarray(visible, bool), heads_q, axis=1)
    scores = _heads_first(q, heads_q) @ _heads_first(k, heads_q).swapaxes(2, 3) * scale
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)  # a row that sees nothing
    exponentials = np.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return exponentials / np.where(total == 0, 1.0, total), lse


def _heads_first(array, heads_q=None):
    """float64 [b, s, h, d] -> [b, heads_q, s, d], heads repeated; or back, without `heads_q`."""
    array = np.asarray(array, np.float64).swapaxes(1, 2)
    return array if heads_q is None else per_query_head(array, heads_q, axis=1)


def _sum_shared(gradient, heads_k):
    """[b, h_q, s_k, d] -> [b, s_k, h_k, d], summed over the query heads that share a key head."""
    b, heads_q, s, d = gradient.shape
    return _heads_first(gradient.reshape(b, heads_k, heads_q // heads_k, s, d).sum(axis=2))


# ---- dropout bits: custom_ops/flashmask/philox.h ----


def philox4x32(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011) on four counter words and two key words, arrays of one shape or scalars.

    Returns the four output words as uint32 arrays.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (product1 >> half) ^ c1 ^ k0, product1 & low, (product0 >> half) ^ c3 ^ k1, product0 & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def dropout_keep(dropout, seed, offset, b, h_q, s_q, s_k):
    """Which scores survive dropout: keep bool [b, h_q, s_q, s_k] and the factor for those that do."""
    seed, offset = int(seed) & (2**64 - 1), int(offset) & (2**64 - 1)
    # The probability is a float32 where the kernels read it.
    threshold = int((1.0 - float(np.float32(dropout))) * 65536.0 + 0.5)
    keep_scale = 0.0 if threshold == 0 else float(np.float32(65536.0) / np.float32(threshold))

    groups = -(-s_k // 8)  # one draw serves eight columns
    batch_head, row, group = np.meshgrid(np.arange(b * h_q), np.arange(s_q), np.arange(groups), indexing="ij")
    words = philox4x32(
        (group, row, batch_head, offset & 0xFFFFFFFF), (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32))
    )
    bits = np.stack(words, axis=-1)[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    keep = bits.reshape(b, h_q, s_q, groups * 8)[..., :s_k] < threshold
    return keep, keep_scale


# ---- the mask, element by element ----


def dense_mask_naive(startend_row_indices, causal, seqlen_q, seqlen_k, block_mask=None, window_size=None):
    """True = visible, [b, h_m, s_q, s_k]; in loops, straight from the definition of the forms."""
    shift = seqlen_k - seqlen_q
    for array in (startend_row_indices, block_mask):
        if array is not None:
            batch, heads = array.shape[:2]
            break
    else:
        batch = heads = 1
    left, right = window_size if isinstance(window_size, tuple | list) else (window_size, window_size)
    visible = np.zeros((batch, heads, seqlen_q, seqlen_k), bool)
    for b, h, i, j in np.ndindex(visible.shape):
        sees = True
        if causal and i < j - shift:
            sees = False
        if startend_row_indices is not None:
            bounds = [int(x) for x in startend_row_indices[b, h, j]]
            if causal and len(bounds) == 1:
                masked = i >= bounds[0]
            elif causal and len(bounds) == 2:
                masked = bounds[0] <= i < bounds[1]
            elif not causal and len(bounds) == 2:
                masked = i >= bounds[0] or i < bounds[1]
            elif not causal and len(bounds) == 4:
                masked = bounds[0] <= i < bounds[1] or bounds[2] <= i < bounds[3]
            else:
                raise ValueError(f"no form has n = {len(bounds)} with causal={causal}")
            sees = sees and not masked
        if window_size is not None:
            if left >= 0 and j < i + shift - left:
                sees = False
            if not causal and right >= 0 and j > i + shift + right:
                sees = False
        if block_mask is not None and block_mask[b, h, i // 128, j // 128] == 0:
            sees = False
        visible[b, h, i, j] = sees
    return visible


FORMS = ((1, True), (2, True), (2, False), (4, False))
"""The pairs (n, causal) that exist."""


def random_intervals(rng, b, h_m, s_q, s_k, n):
    """Nasty row indices, int32 [b, h_m, s_k, n]: runs of columns that share well-formed bounds (so that whole tiles are
    masked or free), and columns that are empty, reversed, out of range, huge or fully masking."""
    shape = (b, h_m, s_k, n)
    wild = rng.integers(-3, s_q + 4, shape)
    extreme = rng.choice(
        np.array([INT32.min, INT32.min + 1, -1, 0, 1, s_q - 1, s_q, s_q + 1, s_k + 1, INT32.max - 1, INT32.max]), shape
    )
    indices = np.where(rng.random(shape) < 0.7, wild, extreme)
    # Long runs of equal, sorted bounds: about three in a row of columns.
    run = np.cumsum(rng.random((b, h_m, s_k)) < 3.0 / s_k, axis=-1)
    ordered = np.sort(rng.integers(0, s_q + 1, (b, h_m, s_k + 1, n)), axis=-1)
    shared = np.take_along_axis(ordered, run[..., None], axis=2)
    tame = rng.random((b, h_m, 1, 1)) < 0.7
    speckle = rng.random((b, h_m, s_k, 1)) < 0.1
    indices = np.where(tame & ~speckle, shared, indices)
    # Columns that no row sees, whatever the form: [0, s_q) or more in the first interval.
    dead = rng.random((b, h_m, s_k)) < 0.05
    indices[dead] = np.array([0, s_q, 0, INT32.max])[:n]
    return indices.astype(np.int32)
