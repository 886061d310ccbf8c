"""Hypothesis strategies for masks: every form, sizes that do not fit the tiles, and bounds that no user would write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import FORMS, INT32, random_intervals


class MaskCase(NamedTuple):
    """The mask arguments of one call."""

    indices: np.ndarray  # int32 [b, h_m, s_k, n]
    causal: bool
    seqlen_q: int
    seqlen_k: int


def bounds(seqlen_q: int, seqlen_k: int) -> st.SearchStrategy[int]:
    """One row bound: mostly near [0, s_q], at times huge, negative or the official "never masked", s_k + 1."""
    special = [INT32.min, INT32.min + 1, -1, 0, seqlen_q, seqlen_q + 1, seqlen_k + 1, INT32.max - 1, INT32.max]
    return st.one_of(st.integers(-2, seqlen_q + 2), st.sampled_from([int(x) for x in special]))


@st.composite
def mask_cases(draw, max_batch=2, max_heads=2, max_seqlen=12) -> MaskCase:
    """Small masks whose every bound Hypothesis chooses (and shrinks)."""
    n, causal = draw(st.sampled_from(FORMS))
    seqlen_q, seqlen_k = draw(st.integers(1, max_seqlen)), draw(st.integers(1, max_seqlen))
    shape = (draw(st.integers(1, max_batch)), draw(st.integers(1, max_heads)), seqlen_k, n)
    indices = draw(hnp.arrays(np.int32, shape, elements=bounds(seqlen_q, seqlen_k)))
    return MaskCase(indices, causal, seqlen_q, seqlen_k)


@st.composite
def tiled_mask_cases(draw, max_batch=2, heads=(1, 2), max_seqlen=300) -> MaskCase:
    """Larger masks, drawn from a seed: several tiles each way, with columns in runs as real masks have them."""
    n, causal = draw(st.sampled_from(FORMS))
    seqlen_q, seqlen_k = draw(st.integers(1, max_seqlen)), draw(st.integers(1, max_seqlen))
    b, h_m = draw(st.integers(1, max_batch)), draw(st.sampled_from(heads))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return MaskCase(random_intervals(rng, b, h_m, seqlen_q, seqlen_k, n), causal, seqlen_q, seqlen_k)
