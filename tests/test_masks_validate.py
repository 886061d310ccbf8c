"""What is refused, and with which words: the attention call uses the same checks."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_flashmask import masks

SIZES = {"batch": 2, "heads_q": 8, "heads_k": 4, "seqlen_q": 200, "seqlen_k": 300}


def indices(b=2, h=1, s=300, n=1, dtype=np.int32):
    return np.zeros((b, h, s, n), dtype)


def block_mask(b=2, h=1, rows=2, columns=3, dtype=np.int32):
    return np.zeros((b, h, rows, columns), dtype)


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize(("n", "causal"), [(1, True), (2, True), (2, False), (4, False)])
def test_good_masks_pass(heads, n, causal):
    masks.validate(indices(h=heads, n=n), causal, **SIZES)
    masks.validate(indices(h=heads, n=n), np.bool_(causal), **SIZES, block_mask=block_mask(h=heads))
    masks.validate(indices(h=heads, n=n), causal)
    masks.validate(None, causal, **SIZES, window_size=(3, -1), block_mask=block_mask(h=heads))
    masks.validate(None, causal)


@pytest.mark.parametrize(
    ("array", "causal", "error", "message"),
    [
        ([[[[1]]]], True, TypeError, r"startend_row_indices: expected an int32 array \[batch.*\], got .* \(list\)"),
        (indices(dtype=np.int64), True, TypeError, r"startend_row_indices.dtype: expected int32, got int64"),
        (indices(dtype=np.float32), True, TypeError, r"startend_row_indices.dtype: expected int32, got float32"),
        (indices(dtype=">i4"), True, TypeError, r"startend_row_indices.dtype: expected int32, got >i4"),
        (indices()[0], True, ValueError, r"startend_row_indices: expected rank 4, .*, got shape \[1, 300, 1\]"),
        (indices(b=3), True, ValueError, r"startend_row_indices.shape\[0\]: expected the batch size = 2, got 3"),
        (indices(b=0), True, ValueError, r"startend_row_indices.shape\[0\]: expected at least 1, got 0"),
        (indices(h=2), True, ValueError, r"\.shape\[1\]: expected 1 or heads_k = 4 or heads_q = 8, got 2"),
        (indices(h=16), True, ValueError, r"\.shape\[1\]: expected 1 or heads_k = 4 or heads_q = 8, got 16"),
        (indices(s=200), True, ValueError, r"startend_row_indices.shape\[2\]: expected seqlen_k = 300, got 200"),
        (indices(n=4), True, ValueError, r"\.shape\[3\]: expected 1 or 2 when causal=True, got 4"),
        (indices(n=3), True, ValueError, r"\.shape\[3\]: expected 1 or 2 when causal=True, got 3"),
        (indices(n=1), False, ValueError, r"\.shape\[3\]: expected 2 or 4 when causal=False, got 1"),
        (indices(n=0), False, ValueError, r"\.shape\[3\]: expected at least 1, got 0"),
        (indices(), 1, TypeError, r"causal: expected a bool, got 1 \(int\)"),
        (indices(), None, TypeError, r"causal: expected a bool, got None"),
    ],
)
def test_bad_indices(array, causal, error, message):
    with pytest.raises(error, match=message):
        masks.validate(array, causal, **SIZES)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (block_mask(dtype=bool), TypeError, r"block_mask.dtype: expected int32, got bool"),
        (block_mask()[0], ValueError, r"block_mask: expected rank 4, .*, got shape \[1, 2, 3\]"),
        (block_mask(b=1), ValueError, r"block_mask.shape\[0\]: expected the batch size = 2, got 1"),
        (block_mask(h=4), ValueError, r"block_mask.shape\[1\]: expected startend_row_indices.shape\[1\] = 1, got 4"),
        (block_mask(rows=3), ValueError, r"block_mask.shape\[2\]: expected ceil\(seqlen_q / 128\) = 2, got 3"),
        (block_mask(columns=2), ValueError, r"block_mask.shape\[3\]: expected ceil\(seqlen_k / 128\) = 3, got 2"),
        (3, TypeError, r"block_mask: expected an int32 array .*, got 3 \(int\)"),
    ],
)
def test_bad_block_mask(blocks, error, message):
    with pytest.raises(error, match=message):
        masks.validate(indices(), True, **SIZES, block_mask=blocks)
    if "shape[0]" in message.replace("\\", ""):  # known from the indices, even if no size is given
        with pytest.raises(error, match=message):
            masks.to_dense(indices(), True, 200, block_mask=blocks)


def test_bad_block_mask_heads_without_indices():
    with pytest.raises(ValueError, match=r"block_mask.shape\[1\]: expected 1 or heads_k = 4 or heads_q = 8, got 3"):
        masks.validate(None, True, **SIZES, block_mask=block_mask(h=3))


def test_window_excludes_indices():
    with pytest.raises(ValueError, match=r"window_size: expected None when startend_row_indices is given"):
        masks.validate(indices(), True, window_size=3)
    with pytest.raises(ValueError, match=r"window_size: expected None when startend_row_indices is given"):
        masks.block_stats(indices(), True, 200, window_size=3)


@pytest.mark.parametrize("name", SIZES)
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        masks.validate(None, True, **{name: 0})
    with pytest.raises(TypeError, match=f"{name}: expected an integer, got 2.0"):
        masks.validate(None, True, **{name: 2.0})


def test_query_heads_are_a_multiple_of_key_heads():
    with pytest.raises(ValueError, match="heads_q: expected a multiple of heads_k = 3, got 8"):
        masks.validate(None, True, heads_q=8, heads_k=3)


def test_one_head_count_known():
    masks.validate(indices(h=2), True, heads_q=8)  # may be heads_k
    masks.validate(indices(h=8), True, heads_k=4)  # may be heads_q
    with pytest.raises(ValueError, match=r"shape\[1\]: expected 1 or heads_q = 8, got 3"):
        masks.validate(indices(h=3), True, heads_q=8)
    with pytest.raises(ValueError, match=r"shape\[1\]: expected 1 or heads_k = 4, got 2"):
        masks.validate(indices(h=2), True, heads_k=4)


class Symbolic:
    """What a variable of a static program shows: unknown dimensions, and a dtype that prints as Paddle's do."""

    def __init__(self, *shape, dtype="paddle.int32"):
        self.shape = list(shape)
        self.dtype = dtype


def test_unknown_dimensions_are_not_checked():
    masks.validate(Symbolic(-1, 1, -1, 2), True, **SIZES)
    masks.validate(Symbolic(-1, -1, None, 1), True, **SIZES, block_mask=Symbolic(-1, 1, -1, -1))
    masks.validate(indices(), True, batch=-1, seqlen_k=-1)
    with pytest.raises(ValueError, match=r"shape\[3\]: expected 1 or 2 when causal=True, got 4"):
        masks.validate(Symbolic(-1, 1, -1, 4), True)
    with pytest.raises(TypeError, match=r"dtype: expected int32, got paddle.int64"):
        masks.validate(Symbolic(-1, 1, -1, 1, dtype="paddle.int64"), True)


def test_wrong_shapes_reach_every_function():
    for function in (masks.to_dense, masks.block_classes, masks.block_stats):
        with pytest.raises(ValueError, match="expected rank 4"):
            function(indices()[0], True, 200)
        with pytest.raises(ValueError, match=r"shape\[2\]: expected at least 1, got 0"):
            function(indices(s=0), True, 200)
        with pytest.raises(ValueError, match=r"shape\[2\]: expected seqlen_k = 299, got 300"):
            function(indices(), True, 200, 299)
        with pytest.raises(ValueError, match="seqlen_q: expected at least 1, got 0"):
            function(None, True, 0)
        with pytest.raises(TypeError, match="seqlen_k: expected an integer"):
            function(None, True, 3, 4.0)
        with pytest.raises(TypeError, match="expected an int32 array"):
            function([1], True, 3)


def test_paddle_tensors():
    paddle = pytest.importorskip("paddle")
    array = masks.causal_document([[3, 2]])[0]
    tensor = paddle.to_tensor(array, place=paddle.CPUPlace())
    masks.validate(tensor, True, batch=1, seqlen_k=5)
    assert (masks.to_dense(tensor, True, 5) == masks.to_dense(array, True, 5)).all()
    assert masks.block_stats(tensor, True, 5) == masks.block_stats(array, True, 5)
    with pytest.raises(TypeError, match=r"startend_row_indices.dtype: expected int32, got paddle.int64"):
        masks.validate(tensor.astype("int64"), True)
    dense = paddle.to_tensor(masks.to_dense(array, True, 5))
    assert (masks.from_dense(dense)[0] == array).all()
