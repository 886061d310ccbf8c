"""Calls of `flashmask_attention` with what they must give, for the tests that go through Paddle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle
import reference

from paddle_flashmask import flashmask_attention, masks

TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 6e-3}


class Tensors(NamedTuple):
    """Inputs and the gradient of the output, float64 but exact in the dtype under test."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` rounded to `dtype`, as float64."""
    return paddle.to_tensor(array.astype(np.float32)).astype(dtype).astype("float32").numpy().astype(np.float64)


def draw(seed=0, batch=2, seqlen_q=40, seqlen_k=40, heads_q=4, heads_k=2, head_dim=16, head_dim_v=24, dtype="float32"):
    """Normal inputs of these sizes."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlen_q, heads_q, head_dim),
        (batch, seqlen_k, heads_k, head_dim),
        (batch, seqlen_k, heads_k, head_dim_v),
        (batch, seqlen_q, heads_q, head_dim_v),
    )
    return Tensors(*(rounded(rng.standard_normal(shape), dtype) for shape in shapes))


def to_paddle(array: np.ndarray | None, dtype: str | None = None, grad: bool = False) -> Any:
    """A tensor of `dtype`; None stays None."""
    if array is None:
        return None
    tensor = paddle.to_tensor(array.astype(np.float32)).astype(dtype) if dtype else paddle.to_tensor(array)
    tensor.stop_gradient = not grad
    return tensor


def operands(tensors: Tensors, dtype: str = "float32") -> list[Any]:
    """q, k and v as leaves that take gradients."""
    return [to_paddle(array, dtype, grad=True) for array in tensors[:3]]


def numpy_of(tensor: Any) -> np.ndarray:
    """float64 copy of a tensor of any float dtype."""
    return tensor.astype("float32").numpy().astype(np.float64)


def visible_of(tensors: Tensors, indices=None, causal=False, window_size=None, block_mask=None) -> np.ndarray:
    """The dense mask of a call, [b, h_m, s_q, s_k]; the reference repeats the heads."""
    naive = reference.dense_mask_naive(
        indices, causal, tensors.q.shape[1], tensors.k.shape[1], block_mask=block_mask, window_size=window_size
    )
    return np.broadcast_to(naive, (tensors.q.shape[0], *naive.shape[1:]))


def expected(tensors: Tensors, visible: np.ndarray, scale: float | None = None, keep=None, keep_scale=1.0):
    """out, lse, dq, dk, dv by the float64 reference."""
    scale = tensors.q.shape[3] ** -0.5 if scale is None else scale
    out, lse = reference.attention(*tensors[:3], visible, scale, keep, keep_scale)
    grads = reference.attention_grads(*tensors[:3], visible, scale, tensors.dout, keep, keep_scale)
    return out, lse, *grads


def call_with_grads(tensors: Tensors, dtype: str = "float32", function=flashmask_attention, indices=None, **kwargs):
    """out, lse, dq, dk, dv by the op in dynamic mode."""
    q, k, v = operands(tensors, dtype)
    out, lse = function(q, k, v, to_paddle(indices), return_softmax_lse=True, **kwargs)
    grads = paddle.grad([out], [q, k, v], [to_paddle(tensors.dout, dtype)])
    return tuple(numpy_of(t) for t in (out, lse, *grads))


def assert_same(actual, wanted, dtype: str = "float32", names=("out", "lse", "dq", "dk", "dv")) -> None:
    """Every array within the tolerance of its dtype, relative to its largest entry; lse is always float32."""
    assert len(actual) == len(wanted) == len(names)
    for name, got, want in zip(names, actual, wanted, strict=True):
        assert got.shape == want.shape, name
        tolerance = TOLERANCE["float32" if name == "lse" else dtype]
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isneginf(got), ~finite, err_msg=name)
        largest = max(1.0, np.abs(want[finite]).max(initial=0.0))
        np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=tolerance * largest, err_msg=name)


def packed(batch: int = 2, lengths=((11, 17, 12), (40,))) -> np.ndarray:
    """Causal documents, int32 [batch, 1, 40, 1]."""
    indices, causal = masks.causal_document([list(row) for row in lengths[:batch]])
    assert causal
    return indices
