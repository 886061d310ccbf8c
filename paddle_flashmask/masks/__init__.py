"""Masks as FlashMask stores them: builders, dense conversion, checks, and what the kernels can skip.

A mask is `startend_row_indices`, int32 `[b, h_m, s_k, n]`: up to two half-open intervals of masked query rows per key
column. Builders take lengths, not tensors, and return `(startend_row_indices, causal)`, ready for the attention call.

| n | causal | last axis          | column j masks the rows          |
|---|--------|--------------------|----------------------------------|
| 1 | True   | LTS                | [LTS, s_q) and the causal part   |
| 2 | True   | LTS, LTE           | [LTS, LTE) and the causal part   |
| 2 | False  | LTS, UTE           | [LTS, s_q) and [0, UTE)          |
| 4 | False  | LTS, LTE, UTS, UTE | [LTS, LTE) and [UTS, UTE)        |

The causal part of column j is the rows i < j - (s_k - s_q). Values are clipped to [0, s_q]; an interval whose start is
not below its end is empty. Only NumPy is needed here.
"""

from ._validate import validate
from .blocks import BlockStats, TileClass, TileCounts, block_classes, block_stats
from .dense import from_dense, to_dense
from .documents import causal_blockwise, causal_document, document, prefix_lm_document, share_question
from .sparse import hash_sparse, qk_sparse, random_eviction
from .windows import causal, full, global_sliding_window, prefix_lm_causal, sliding_window, window_indices

__all__ = [
    "BlockStats",
    "TileClass",
    "TileCounts",
    "block_classes",
    "block_stats",
    "causal",
    "causal_blockwise",
    "causal_document",
    "document",
    "from_dense",
    "full",
    "global_sliding_window",
    "hash_sparse",
    "prefix_lm_causal",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
    "share_question",
    "sliding_window",
    "to_dense",
    "validate",
    "window_indices",
]
