"""Dropout: the bits are those of the NumPy Philox, and forward and backward drop the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from attention_case import AttentionCase, assert_close, assert_same_bits

from paddle_flashmask import _core


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (42, 7), (-1, 2**40 + 3), (2**62 + 1, -5)])
def test_bits_are_philox(seed, offset):
    keep, factor = reference.dropout_keep(0.37, seed, offset, 2, 3, 21, 37)
    for batch, head in np.ndindex(2, 3):
        mine, my_factor = _core.load_library().dropout_keep_mask(0.37, seed, offset, batch, head, 3, 21, 37)
        np.testing.assert_array_equal(mine, keep[batch, head])
        assert my_factor == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999, 1.0])
def test_values(dropout, isa):
    bounds = reference.random_intervals(np.random.default_rng(1), 2, 1, 150, 190, 2)
    case = AttentionCase(2, 150, 190, 4, 2, 24, 40, bounds=bounds, causal=False, dropout=dropout)
    expected = case.expected()
    # Kept values are scaled up, and so is their rounding.
    scale = max(1.0, case.dropout_keep()["keep_scale"])
    for name, want in case.run(isa=isa).items():
        finite = np.isfinite(expected[name])
        np.testing.assert_allclose(want[finite], expected[name][finite], atol=2e-5 * scale, err_msg=name)


def test_no_dropout_is_plain_attention():
    plain = AttentionCase(1, 100, 100, causal=True)
    assert_same_bits(plain.run(), AttentionCase(1, 100, 100, causal=True, dropout=0.0, seed=9).run())
    assert_close(plain, plain.run())


def test_the_share_that_is_kept():
    keep, factor = _core.load_library().dropout_keep_mask(0.2, 1, 2, 0, 0, 1, 512, 512)
    assert keep.mean() == pytest.approx(0.8, abs=4 * (0.16 / keep.size) ** 0.5)
    assert factor == pytest.approx(1.25, rel=1e-4)


@pytest.mark.parametrize(
    ("position", "name", "value"),
    [
        (0, "dropout", 1.5),
        (0, "dropout", float("nan")),
        (3, "batch_index", -1),
        (4, "head_index", 2),
        (4, "head_index", 2**32),  # 0 in 32 bits
        (5, "heads_q", 0),
        (6, "seqlen_q", -3),
        (7, "seqlen_k", 0),
    ],
)
def test_bad_arguments_of_the_keep_mask(position, name, value):
    arguments = [0.5, 1, 2, 0, 0, 2, 16, 16]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        _core.load_library().dropout_keep_mask(*arguments)


def test_skipping_and_threads_change_no_bit():
    bounds = reference.random_intervals(np.random.default_rng(2), 1, 2, 300, 300, 1)
    case = AttentionCase(1, 300, 300, 2, 2, 16, bounds=bounds, causal=True, dropout=0.4)
    results = case.run()
    for options in ({"flags": _core.FLAG_NO_SKIP}, {"num_threads": 1}, {"num_threads": 5}):
        assert_same_bits(results, case.run(**options))
