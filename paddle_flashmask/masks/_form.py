"""The forms of `startend_row_indices`, and the array in which every column is masked for every row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = tuple[npt.NDArray[np.int32], bool]
"""`(startend_row_indices, causal)`, the indices int32 `[b, h_m, s_k, n]`."""

FORMS = {(1, True): "LTS", (2, True): "LTS, LTE", (2, False): "LTS, UTE", (4, False): "LTS, LTE, UTS, UTE"}
"""What the last axis holds, by (n, causal)."""


def has_lower_end(n: int, causal: bool) -> bool:
    """Whether LTE is given; otherwise the lower interval runs to the last row."""
    return (n, causal) in ((2, True), (4, False))


def fully_masked(batch: int, heads: int, seqlen: int, n: int, causal: bool) -> npt.NDArray[np.int32]:
    """Indices `[batch, heads, seqlen, n]` whose columns hide their keys from every row: builders fill in the rest."""
    indices = np.zeros((batch, heads, seqlen, n), np.int32)
    if has_lower_end(n, causal):
        indices[..., 1] = seqlen
    return indices
