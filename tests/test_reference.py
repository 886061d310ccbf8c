"""The reference stands on things that are known: published Philox words, finite differences, hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from reference import (
    FORMS,
    INT32,
    attention,
    attention_grads,
    dense_mask_naive,
    dropout_keep,
    philox4x32,
    random_intervals,
)

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123, the authors' implementation
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)) == expected


def _keep_one(dropout, seed, offset, b, h, heads_q, i, j):
    """One decision, in Python integers, following the comments of philox.h."""
    seed, offset = seed % 2**64, offset % 2**64
    counter = (j // 8, i, b * heads_q + h, offset % 2**32)
    words = philox4x32(counter, (seed % 2**32, seed // 2**32 ^ offset // 2**32))
    word, element = divmod(j % 8, 2)
    bits = int(words[word]) // (2**16 if element else 1) % 2**16
    return bits < round((1 - dropout) * 65536)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1234, 7), (-1, -2), (2**63 - 1, -(2**63)), (5 << 40, 3 << 33)])
def test_dropout_bits_one_by_one(seed, offset):
    b, h_q, s_q, s_k = 2, 3, 4, 21
    keep, scale = dropout_keep(0.25, seed, offset, b, h_q, s_q, s_k)
    assert keep.shape == (b, h_q, s_q, s_k)
    assert scale == pytest.approx(1 / 0.75, rel=1e-7)
    for index in np.ndindex(keep.shape):
        assert keep[index] == _keep_one(0.25, seed, offset, index[0], index[1], h_q, index[2], index[3]), index


def test_dropout_extremes_and_rate():
    keep, scale = dropout_keep(0.0, 3, 0, 1, 2, 8, 16)
    assert keep.all()
    assert scale == 1.0
    keep, scale = dropout_keep(1.0, 3, 0, 1, 2, 8, 16)
    assert not keep.any()
    assert scale == 0.0
    keep, scale = dropout_keep(0.1, 3, 0, 2, 4, 64, 256)
    deviation = np.sqrt(0.1 * 0.9 / keep.size)
    assert abs(keep.mean() - 0.9) < 5 * deviation
    assert scale == pytest.approx(1 / 0.9, rel=1e-4)  # the probability is a multiple of 2^-16


def test_dropout_depends_on_every_part_of_its_key():
    base = dropout_keep(0.5, 10, 20, 2, 2, 8, 64)[0]
    for seed, offset in ((11, 20), (10 + (1 << 32), 20), (10, 21), (10, 20 + (1 << 32))):
        assert (dropout_keep(0.5, seed, offset, 2, 2, 8, 64)[0] != base).mean() > 0.4
    for one, other in ((base[0], base[1]), (base[:, 0], base[:, 1]), (base[..., :4, :], base[..., 4:, :])):
        assert (one != other).mean() > 0.4
    assert (dropout_keep(0.5, 10, 20, 2, 2, 5, 21)[0] == base[:, :, :5, :21]).all()  # not on the sequence lengths


CASES = {  # b, s_q, s_k, h_q, h_k, h_m, d, d_v
    "mha": (1, 4, 4, 2, 2, 1, 3, 3),
    "gqa, mask of key heads": (2, 3, 5, 4, 2, 2, 2, 3),
    "mqa, mask of query heads": (1, 5, 3, 3, 1, 3, 2, 1),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    b, s_q, s_k, h_q, h_k, h_m, d, d_v = request.param
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((b, s_q, h_q, d)), rng.standard_normal((b, s_k, h_k, d))
    v, dout = rng.standard_normal((b, s_k, h_k, d_v)), rng.standard_normal((b, s_q, h_q, d_v))
    visible = rng.random((b, h_m, s_q, s_k)) < 0.7
    visible[:, :, 1] = False  # a row that sees nothing
    return q, k, v, visible, dout


def test_attention_in_loops(case):
    q, k, v, visible, _ = case
    out, lse = attention(q, k, v, visible, 0.6)
    heads_q, heads_k, heads_m = q.shape[2], k.shape[2], visible.shape[1]
    for b, i, h in np.ndindex(q.shape[:3]):
        kh, mh = h // (heads_q // heads_k), h // (heads_q // heads_m)
        weights = {j: np.exp(0.6 * q[b, i, h] @ k[b, j, kh]) for j in range(k.shape[1]) if visible[b, mh, i, j]}
        total = sum(weights.values())
        if not weights:
            assert lse[b, h, i] == -np.inf
            assert (out[b, i, h] == 0).all()
            continue
        np.testing.assert_allclose(lse[b, h, i], np.log(total), rtol=1e-12)
        expected = sum(w * v[b, j, kh] for j, w in weights.items()) / total
        np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_match_finite_differences(case, dropout):
    q, k, v, visible, dout = case
    keep, keep_scale = None, 1.0
    if dropout:
        keep, keep_scale = dropout_keep(dropout, 1, 2, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert not keep.all()
    grads = attention_grads(q, k, v, visible, 0.6, dout, keep, keep_scale)
    step = 1e-6
    for name, tensor, grad in zip("qkv", (q, k, v), grads, strict=True):
        assert grad.shape == tensor.shape
        for index in np.ndindex(tensor.shape):
            saved = tensor[index]
            values = []
            for moved in (saved + step, saved - step):
                tensor[index] = moved
                values.append((attention(q, k, v, visible, 0.6, keep, keep_scale)[0] * dout).sum())
            tensor[index] = saved
            slope = (values[0] - values[1]) / (2 * step)
            assert grad[index] == pytest.approx(slope, rel=1e-6, abs=1e-8), (name, index)


def test_rows_that_see_nothing_and_large_scores_stay_finite(case):
    q, k, v, visible, dout = case
    out, lse = attention(q * 1e3, k, v, visible, 10.0)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    grads = attention_grads(q * 1e3, k, v, visible, 10.0, dout)
    assert all(np.isfinite(grad).all() for grad in grads)
    grads = attention_grads(q, k, v, np.zeros_like(visible), 1.0, dout)
    assert all((grad == 0).all() for grad in grads)


def test_naive_mask_by_hand():
    """The four forms on three columns, written out."""
    one = np.array([[[[2], [3], [9]]]], np.int32)
    assert dense_mask_naive(one, True, 3, 3)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    two = np.array([[[[1, 2], [2, 1], [-5, 99]]]], np.int32)
    assert dense_mask_naive(two, True, 3, 3)[0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert dense_mask_naive(two, False, 3, 3)[0, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    four = np.array([[[[1, 2, 0, 0], [0, 1, 2, 9], [2, 0, 1, 1]]]], np.int32)
    assert dense_mask_naive(four, False, 3, 3)[0, 0].tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1]]


def test_naive_mask_aligns_to_the_bottom_right():
    assert dense_mask_naive(None, True, 2, 4)[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert dense_mask_naive(None, True, 4, 2)[0, 0].tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]
    window = dense_mask_naive(None, False, 2, 4, window_size=(1, 0))
    assert window[0, 0].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(("n", "causal"), FORMS)
def test_random_intervals_are_nasty(n, causal):
    rng = np.random.default_rng(0)
    s_q, s_k = 40, 50
    many = np.concatenate([random_intervals(rng, 2, 2, s_q, s_k, n) for _ in range(20)])
    assert many.dtype == np.int32
    assert many.shape == (40, 2, s_k, n)
    for value in (INT32.min, -1, 0, s_q, s_k + 1, INT32.max):
        assert (many == value).any(), value
    if n > 1:
        assert (many[..., 0] > many[..., 1]).any()
        assert (many[..., 0] == many[..., 1]).any()
    equal_neighbours = (many[:, :, 1:] == many[:, :, :-1]).all(axis=-1)
    assert 0.3 < equal_neighbours.mean() < 0.9  # whole tiles share their bounds
    visible = dense_mask_naive(many[:2], causal, s_q, s_k)
    assert (~visible).all(axis=2).any()  # a column that no row sees
    assert visible.any()
