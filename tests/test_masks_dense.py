"""to_dense against the element loop, from_dense as its inverse, and what window_size stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import FORMS, dense_mask_naive, random_intervals
from strategies import mask_cases, tiled_mask_cases

from paddle_flashmask import masks

SIZES = [(1, 1), (1, 5), (5, 1), (6, 6), (4, 9), (9, 4)]


@given(mask_cases())
def test_to_dense_is_the_definition(case):
    dense = masks.to_dense(case.indices, case.causal, case.seqlen_q)
    assert dense.dtype == bool
    assert (dense == dense_mask_naive(*case)).all()


@given(tiled_mask_cases(max_seqlen=30, heads=(1, 3)))
def test_to_dense_is_the_definition_on_runs_of_columns(case):
    assert (masks.to_dense(*case) == dense_mask_naive(*case)).all()


@pytest.mark.parametrize(("s_q", "s_k"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_to_dense_without_indices(s_q, s_k, causal):
    dense = masks.to_dense(None, causal, s_q, s_k)
    assert dense.shape == (1, 1, s_q, s_k)
    assert (dense == dense_mask_naive(None, causal, s_q, s_k)).all()


@pytest.mark.parametrize(("s_q", "s_k"), [(130, 257), (257, 130), (128, 128), (1, 300)])
@pytest.mark.parametrize(("n", "causal"), [*FORMS, (0, True), (0, False)])
def test_to_dense_with_block_mask(s_q, s_k, n, causal):
    rng = np.random.default_rng(s_q + n)
    blocks = rng.integers(0, 2, (2, 3, -(-s_q // 128), -(-s_k // 128)), np.int32) * np.int32(7)
    indices = random_intervals(rng, 2, 3, s_q, s_k, n) if n else None
    dense = masks.to_dense(indices, causal, s_q, s_k, block_mask=blocks)
    without = masks.to_dense(indices, causal, s_q, s_k)
    row, column = np.arange(s_q)[:, None] // 128, np.arange(s_k) // 128
    assert (dense == (without & (blocks[:, :, row, column] != 0))).all()


def test_official_value_for_never_masked():
    indices = np.full((1, 1, 7, 1), 7 + 1, np.int32)  # s_k + 1, as the official eviction benchmark has it
    assert (masks.to_dense(indices, True, 7) == masks.to_dense(None, True, 7)).all()
    assert (masks.to_dense(indices, True, 5) == masks.to_dense(None, True, 5, 7)).all()


# ---- window_size ----


@pytest.mark.parametrize(("s_q", "s_k"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [-1, 0, 2, 2**31 - 1])
@pytest.mark.parametrize("right", [-1, 0, 1, 100])
def test_window(s_q, s_k, causal, left, right):
    expected = dense_mask_naive(None, causal, s_q, s_k, window_size=(left, right))
    assert (masks.to_dense(None, causal, s_q, s_k, window_size=(left, right)) == expected).all()
    indices, form = masks.window_indices((left, right), s_q, s_k, causal, batch=2, heads=3)
    if indices is not None:
        assert indices.shape[:3] == (2, 3, s_k)
    assert (masks.to_dense(indices, form, s_q, s_k) == expected).all()
    if left == right:
        assert (masks.to_dense(None, causal, s_q, s_k, window_size=left) == expected).all()


def test_window_takes_the_shortest_form():
    def form(window, causal):
        indices, causal = masks.window_indices(window, 6, 6, causal)
        return (0 if indices is None else indices.shape[3]), causal

    assert form((-1, -1), False) == (0, False)
    assert form(-1, True) == (0, True)
    assert form((-1, 0), False) == (0, True)
    assert form((2, 0), False) == (1, True)
    assert form((2, 5), True) == (1, True)
    assert form(2, False) == (2, False)
    assert form((-1, 2), False) == (2, False)
    assert (masks.window_indices(3, 9, 9, True)[0] == masks.sliding_window(9, 4)[0]).all()


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (-2, ValueError, "window_size: expected at least -1, got -2"),
        ((1, -2), ValueError, r"window_size\[1\]: expected at least -1, got -2"),
        ((1, 2, 3), ValueError, r"window_size: expected an integer or \(left, right\), got \(1, 2, 3\)"),
        ((), ValueError, r"window_size: expected an integer or \(left, right\), got \(\)"),
        (1.0, TypeError, r"window_size: expected an integer, got 1.0 \(float\)"),
        (True, TypeError, r"window_size: expected an integer, got True \(bool\)"),
        ("12", TypeError, r"window_size: expected an integer, got '12' \(str\)"),
        ((1, None), TypeError, r"window_size\[1\]: expected an integer, got None"),
        (2**31, ValueError, "window_size: expected at most 2147483647"),
    ],
)
def test_bad_window(window, error, message):
    with pytest.raises(error, match=message):
        masks.window_indices(window, 4, 4, False)
    with pytest.raises(error, match=message):
        masks.to_dense(None, False, 4, window_size=window)
    with pytest.raises(error, match=message):
        masks.validate(None, False, window_size=window)


def test_bad_window_sizes():
    for name in ("seqlen_q", "seqlen_k", "batch", "heads"):
        arguments = {"seqlen_q": 4, "seqlen_k": 4, "batch": 1, "heads": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            masks.window_indices(1, causal=True, **arguments)
    with pytest.raises(TypeError, match="causal: expected a bool, got 1"):
        masks.window_indices(1, 4, 4, 1)


# ---- from_dense ----


def fewest_columns(dense, causal):
    """Brute force on run lengths: the n that a dense mask needs with this `causal`, None if no form will do."""
    s_q, s_k = dense.shape[2:]
    needed = 0
    for b, h, j in np.ndindex(dense.shape[0], dense.shape[1], s_k):
        column = "".join(".#"[int(not x)] for x in dense[b, h, :, j])
        hidden = max(0, min(s_q, j - (s_k - s_q)))
        if causal:
            if "." in column[:hidden]:
                return None
            column = column[hidden:]
        runs = [run for run in column.split(".") if run]
        if causal:
            if len(runs) > 1:
                return None
            n = 0 if not runs else 1 if column.endswith("#") else 2
        else:
            if len(runs) > 2:
                return None
            inner = [run for run in column.strip("#").split(".") if run]
            n = 0 if not runs else 2 if not inner else 4
        needed = max(needed, n)
    return needed


@given(mask_cases(max_seqlen=8))
def test_from_dense_inverts_to_dense(case):
    dense = masks.to_dense(*case)
    for wanted in (None, case.causal):
        indices, causal = masks.from_dense(dense, wanted)
        assert wanted is None or causal == wanted
        back = masks.to_dense(indices, causal, case.seqlen_q, case.seqlen_k)
        assert (np.broadcast_to(back, dense.shape) == dense).all()
        n = 0 if indices is None else indices.shape[3]
        assert n == fewest_columns(dense, causal)
        if wanted is None:
            other = fewest_columns(dense, not causal)
            assert other is None or n <= other


@given(hnp.arrays(bool, st.tuples(st.just(2), st.just(1), st.integers(1, 7), st.integers(1, 4))))
def test_from_dense_of_any_mask_is_exact_or_refused(dense):
    for wanted in (None, True, False):
        possible = [fewest_columns(dense, c) for c in ([wanted] if wanted is not None else [True, False])]
        if all(n is None for n in possible):
            with pytest.raises(ValueError, match=r"dense: column \d+ of batch \d+, head 0 "):
                masks.from_dense(dense, wanted)
            continue
        indices, causal = masks.from_dense(dense, wanted)
        back = masks.to_dense(indices, causal, *dense.shape[2:])
        assert (np.broadcast_to(back, dense.shape) == dense).all()
        assert (0 if indices is None else indices.shape[3]) == min(n for n in possible if n is not None)


def test_from_dense_says_what_is_wrong():
    dense = np.ones((2, 3, 8, 4), bool)
    dense[1, 2, [0, 2, 5, 6], 3] = False
    message = (
        r"dense: column 3 of batch 1, head 2 masks 3 separate spans of rows, \[0, 1\), \[2, 3\), \[5, 7\); "
        r"expected at most 2 \(n = 4\)"
    )
    for causal in (None, False):
        with pytest.raises(ValueError, match=message):
            masks.from_dense(dense, causal)
    dense = np.tril(np.ones((6, 6), bool))
    dense[1, 4] = True
    with pytest.raises(ValueError, match="column 4 of batch 0, head 0 is visible to row 1, which causal=True masks"):
        masks.from_dense(dense, True)
    dense = np.tril(np.ones((6, 6), bool))
    dense[[2, 4], 1] = False
    with pytest.raises(ValueError, match=r"column 1 .* 2 separate spans of rows besides .*, \[2, 3\), \[4, 5\);"):
        masks.from_dense(dense, True)


@pytest.mark.parametrize(
    ("dense", "causal", "error", "message"),
    [
        (np.ones((4, 4)), None, TypeError, r"dense: expected a bool array \(True = visible\), got float64"),
        ([[True]], None, TypeError, r"dense: expected a bool array .*, got \[\[True\]\] \(list\)"),
        (np.ones((1, 4, 4), bool), None, ValueError, r"dense: expected .*, got shape \[1, 4, 4\]"),
        (np.ones((0, 4), bool), None, ValueError, r"dense: expected no empty axis, got shape \[0, 4\]"),
        (np.ones((4, 4), bool), 1, TypeError, "causal: expected a bool or None, got 1"),
    ],
)
def test_from_dense_bad_arguments(dense, causal, error, message):
    with pytest.raises(error, match=message):
        masks.from_dense(dense, causal)


def test_from_dense_keeps_tiles_tight():
    """Neighbouring columns must agree on which interval is which, or the tile bounds fall apart."""
    for build in (
        masks.global_sliding_window(512, 4, 40, 40),
        masks.document([[100, 200, 212]]),
        masks.causal_document([[300, 212]]),
    ):
        again = masks.from_dense(masks.to_dense(*build, 512))
        for tile in ((32, 32), (64, 128)):
            ours = masks.block_classes(*again, 512, tile=tile)
            assert (ours == masks.block_classes(*build, 512, tile=tile)).all()
