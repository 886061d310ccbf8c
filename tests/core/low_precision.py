"""Attention as a framework without a fused kernel computes it in 16 bits: every intermediate is rounded.

FlashAttention's tests allow a kernel twice the error that this makes against float32.
"""

from __future__ import annotations

import numpy as np
import reference
from attention_case import AttentionCase, rounded


def naive_results(case: AttentionCase) -> dict[str, np.ndarray]:
    """out, dq, dk, dv as float32."""

    def to(array: np.ndarray) -> np.ndarray:
        return rounded(array, case.dtype)

    query, key, value, dout = (operand.swapaxes(1, 2) for operand in case.operands)
    group = case.heads_q // case.heads_k
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    visible = reference.per_query_head(case.visible(), case.heads_q, axis=1)
    scores = np.where(visible, to(to(query @ key.swapaxes(2, 3)) * np.float32(case.true_scale)), -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = exponentials.sum(axis=-1, keepdims=True)
    probabilities = to(exponentials / np.where(total == 0, 1, total))
    out = to(probabilities @ value)
    dvalue = to(probabilities.swapaxes(2, 3) @ dout)
    dprobabilities = to(dout @ value.swapaxes(2, 3))
    delta = (probabilities * dprobabilities).sum(axis=-1, keepdims=True)
    dscores = to(to(probabilities * (dprobabilities - delta)) * np.float32(case.true_scale))
    dquery, dkey = to(dscores @ key), to(dscores.swapaxes(2, 3) @ query)

    def shared(gradient: np.ndarray) -> np.ndarray:
        batch, _, rows, columns = gradient.shape
        return to(gradient.reshape(batch, case.heads_k, group, rows, columns).sum(axis=2))

    results = {"out": out, "dq": dquery, "dk": shared(dkey), "dv": shared(dvalue)}
    return {name: array.swapaxes(1, 2) for name, array in results.items()}
