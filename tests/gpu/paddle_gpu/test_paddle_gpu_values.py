"""`flashmask_attention` on Paddle's GPU tensors: output, lse and all gradients.

Against the float64 reference, and bit for bit against the C entry points of the same library.
"""

from __future__ import annotations

from typing import Any

import carrier
import numpy as np
import paddle
import pytest
import reference
from attention_case import AttentionCase

from paddle_flashmask import flashmask_attention, masks

carrier.require_device()

S = 300
DOCUMENTS = [[70, 130, 60, 40], [200, 50, 20]]  # the second row ends in padding: fully masked rows
MASKS = {
    "full": lambda: masks.full(),
    "causal": lambda: masks.causal(),
    "causal_document": lambda: masks.causal_document(DOCUMENTS, S),
    "share_question": lambda: masks.share_question([[[100, 40, 60], [30, 20, 50]], [[150, 50, 50]]], S),
    "sliding_window": lambda: masks.sliding_window([S, 200], 48, S),
    "document": lambda: masks.document(DOCUMENTS, S),
    "global_sliding_window": lambda: masks.global_sliding_window([S, 260], 10, 30, 20, S),
    "random_eviction": lambda: masks.random_eviction([S, 290], seed=3, seqlen=S),
}
DTYPES = ("bfloat16", "float16")


def check(case: AttentionCase, record_property: Any, **options: Any) -> None:
    """Right, and the bits of the C entry points."""
    results = carrier.through_paddle(case, deterministic=True, **options)
    for name, error in carrier.assert_right(case, results).items():
        record_property(f"error_{name}", round(error, 6))
    carrier.assert_same_bits(results, carrier.through_c(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, head_dim, dtype, record_property):
    bounds, causal = MASKS[mask]()
    case = AttentionCase(2, S, S, 4, 2, head_dim, bounds=bounds, causal=causal, dtype=dtype)
    check(case, record_property)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(257, 130), (130, 257), (1, 300)])
@pytest.mark.parametrize(("n", "causal"), reference.FORMS)
def test_forms_with_unequal_lengths(n, causal, seqlen_q, seqlen_k, dtype, record_property):
    """Random intervals, good and bad, with s_q != s_k and a mask for each key head."""
    bounds = reference.random_intervals(np.random.default_rng(n), 2, 2, seqlen_q, seqlen_k, n)
    case = AttentionCase(2, seqlen_q, seqlen_k, 4, 2, 64, bounds=bounds, causal=causal, dtype=dtype)
    check(case, record_property)


@pytest.mark.parametrize(("heads_q", "heads_k", "heads_mask"), [(4, 4, 1), (6, 2, 6), (6, 2, 2), (3, 1, 3)])
def test_head_layouts(heads_q, heads_k, heads_mask, record_property):
    bounds = reference.random_intervals(np.random.default_rng(heads_q), 1, heads_mask, 200, 200, 2)
    check(
        AttentionCase(1, 200, 200, heads_q, heads_k, 128, bounds=bounds, causal=True, dtype="bfloat16"), record_property
    )


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(40, 40), (104, 64), (64, 128)])
def test_padded_head_dims(head_dim, head_dim_v, record_property):
    check(AttentionCase(1, 150, 150, 2, 1, head_dim, head_dim_v, causal=True, dtype="float16"), record_property)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed_on_host", [False, True])
def test_dropout_with_a_fixed_seed(dtype, seed_on_host, record_property):
    """The bits dropped are those of the reference, and of the C entry points; the seed may lie on either side."""
    bounds, causal = MASKS["causal_document"]()
    case = AttentionCase(2, S, S, 4, 2, 64, bounds=bounds, causal=causal, dtype=dtype, dropout=0.3, seed=2**40 + 17)
    place = paddle.CPUPlace() if seed_on_host else None
    check(case, record_property, fixed_seed_offset=carrier.seed_tensor(case, place))


def test_seed_offset_is_returned_as_given():
    case = AttentionCase(1, 64, 64, 2, 2, 64, dtype="bfloat16", dropout=0.5)
    query, key, value = (carrier.tensor(array) for array in case.stored()[:3])
    seed = carrier.seed_tensor(case)
    outputs = flashmask_attention(
        query, key, value, dropout=0.5, fixed_seed_offset=seed, return_softmax_lse=True, return_seed_offset=True
    )
    assert [list(output.shape) for output in outputs] == [[1, 64, 2, 64], [1, 2, 64], [2]]
    assert outputs[2].numpy().tolist() == [case.seed, case.offset]


def test_block_mask(record_property):
    rng = np.random.default_rng(2)
    block_mask = (rng.random((2, 2, 3, 3)) < 0.6).astype(np.int32)
    bounds = reference.random_intervals(rng, 2, 2, S, S, 1)
    case = AttentionCase(2, S, S, 4, 2, 64, bounds=bounds, causal=True, dtype="bfloat16", block_mask=block_mask)
    check(case, record_property)


@pytest.mark.parametrize("window", [(30, 0), (20, 40)])
def test_window_size(window, record_property):
    """The package builds the window's indices itself, on the device of query."""
    causal = window[1] == 0
    bounds, _ = masks.window_indices(window, S, S, causal, 2, 1)
    case = AttentionCase(2, S, S, 2, 2, 64, bounds=bounds, causal=causal, dtype="bfloat16")
    query, key, value = (carrier.tensor(array, grad=True) for array in case.stored()[:3])
    out, lse = flashmask_attention(
        query, key, value, window_size=window, causal=causal, return_softmax_lse=True, deterministic=True
    )
    gradients = paddle.grad(out, [query, key, value], grad_outputs=[carrier.tensor(case.stored()[3])])
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (t.numpy() for t in (out, lse, *gradients)), strict=True))
    carrier.assert_right(case, results)
    carrier.assert_same_bits(results, carrier.through_c(case))


def test_rows_that_see_nothing():
    """Every row of the second half, and one whole batch entry: exact zeros and -inf, not small numbers."""
    bounds = np.full((2, 1, S, 1), S, np.int32)
    bounds[0] = 150
    bounds[1] = 0
    case = AttentionCase(2, S, S, 2, 2, 64, bounds=bounds, causal=True, dtype="bfloat16")
    results = carrier.through_paddle(case)
    carrier.assert_right(case, results)
    assert not results["out"][0, 150:].any()
    assert not results["dq"][0, 150:].any()
    assert not any(results[name][1].any() for name in ("out", "dq", "dk", "dv"))
    assert np.isneginf(results["lse"][1]).all()


@pytest.mark.parametrize("asked_by", ["argument", "flag"])
def test_deterministic_gradients_repeat(asked_by):
    """Long enough that many blocks add to one row of dQ."""
    s = 2048 if carrier.ON_GPU else 256
    bounds, causal = masks.causal_document([[s // 2, s // 2]])
    case = AttentionCase(1, s, s, 4, 2, 64, bounds=bounds, causal=causal, dtype="bfloat16")
    flag = "FLAGS_cudnn_deterministic"
    if asked_by == "flag" and not paddle.is_compiled_with_cuda():
        pytest.skip(f"this Paddle has no {flag}")
    options = {"deterministic": True} if asked_by == "argument" else {}
    try:
        if asked_by == "flag":
            paddle.set_flags({flag: True})
        runs = [carrier.through_paddle(case, **options) for _ in range(4)]
    finally:
        if asked_by == "flag":
            paddle.set_flags({flag: False})
    for other in runs[1:]:
        carrier.assert_same_bits(runs[0], other)
    carrier.assert_same_bits(runs[0], carrier.through_c(case, deterministic=True))


def test_fast_gradients_are_right():
    """Without `deterministic`: the sums of dQ come in any order, everything else has the same bits."""
    bounds, causal = MASKS["causal_document"]()
    case = AttentionCase(2, S, S, 4, 2, 128, bounds=bounds, causal=causal, dtype="bfloat16")
    results = carrier.through_paddle(case, deterministic=False)
    carrier.assert_right(case, results)
    direct = carrier.through_c(case, deterministic=False)
    for name in ("out", "lse", "dk", "dv"):
        np.testing.assert_array_equal(results[name], direct[name], err_msg=name)
