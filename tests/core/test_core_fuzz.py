"""Random intervals, the nastier the better; and what must not change a single bit."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import strategies
from attention_case import AttentionCase, assert_close, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_flashmask import _core


@st.composite
def attention_cases(draw) -> AttentionCase:
    mask = draw(strategies.tiled_mask_cases(heads=(1, 2, 4)))
    heads_mask = mask.indices.shape[1]
    heads_k = draw(st.sampled_from([1, 2, 4] if heads_mask != 2 else [2]))
    return AttentionCase(
        mask.indices.shape[0],
        mask.seqlen_q,
        mask.seqlen_k,
        4,
        heads_k,
        8 * draw(st.integers(1, 9)),
        8 * draw(st.integers(1, 9)),
        bounds=mask.indices,
        causal=mask.causal,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        rng_seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=80)
@given(attention_cases())
def test_random_intervals(case):
    results = case.run()
    assert_close(case, results)
    # Skipping, threads: not one bit.
    assert_same_bits(results, case.run(flags=_core.FLAG_NO_SKIP))
    assert_same_bits(results, case.run(num_threads=1))
    assert_same_bits(results, case.run(num_threads=3))


@settings(max_examples=60)
@given(strategies.mask_cases(max_seqlen=20))
def test_every_bound_that_hypothesis_can_think_of(mask):
    batch, heads = mask.indices.shape[:2]
    case = AttentionCase(batch, mask.seqlen_q, mask.seqlen_k, heads, heads, 8, bounds=mask.indices, causal=mask.causal)
    assert_close(case, case.run())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("form", reference.FORMS)
def test_skipping_and_threads_change_no_bit(form, isa, dtype):
    n, causal = form
    bounds = reference.random_intervals(np.random.default_rng(n), 2, 2, 400, 500, n)
    case = AttentionCase(2, 400, 500, 4, 2, 48, bounds=bounds, causal=causal, dtype=dtype)
    results = case.run(isa=isa)
    for options in ({"flags": _core.FLAG_NO_SKIP}, {"num_threads": 1}, {"num_threads": 2}, {"num_threads": 7}):
        assert_same_bits(results, case.run(isa=isa, **options))


def test_one_head_on_many_threads_repeats_to_the_bit():
    """Column tiles of one head share dQ: a race would show as a moving result."""
    case = AttentionCase(1, 1500, 1500, 1, 1, 16, causal=True)
    first = case.run(num_threads=1)
    for _ in range(10):
        assert_same_bits(first, case.run(num_threads=6))


def test_one_mask_in_several_forms_gives_the_same_bits():
    length, cut = 350, np.random.default_rng(0).integers(0, 400, 350)
    columns = np.arange(length)
    forms = {
        (1, True): [cut],
        (2, True): [cut, np.full(length, length)],
        (2, False): [cut, columns],
        (4, False): [cut, np.full(length, length), np.zeros(length, int), columns],
        # The intervals the other way round: the order must not matter.
        (4.5, False): [np.zeros(length, int), columns, cut, np.full(length, length)],
    }
    results = []
    for (_, causal), bounds in forms.items():
        indices = np.stack(bounds, axis=-1).astype(np.int32)[None, None]
        results.append(AttentionCase(1, length, length, bounds=indices, causal=causal).run())
    for other in results[1:]:
        assert_same_bits(results[0], other)
