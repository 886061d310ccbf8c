"""Carries NumPy arrays to Paddle tensors and back, and calls the op and the C entry points on them.

Every number is made and compared in NumPy: the Paddle under test may have no working kernels but copies (slim.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from attention_case import NAMES, AttentionCase, loaded, rounded
from low_precision import naive_results

import paddle_flashmask
from paddle_flashmask import _core

DEVICE = os.environ.get("FLASHMASK_PADDLE_DEVICE", "gpu")
ON_GPU = DEVICE == "gpu"


def why_not() -> str | None:
    """Why the checks cannot run here, or None if they can."""
    if not ON_GPU:
        return None
    if not paddle.is_compiled_with_cuda():
        return "the installed Paddle is a build without CUDA"
    if paddle.device.cuda.device_count() < 1:
        return "there is no CUDA device"
    return None


def require_device() -> None:
    """Skips the calling module where it cannot run; otherwise makes the device Paddle's current one."""
    reason = why_not()
    if reason:
        pytest.skip(reason, allow_module_level=True)
    paddle.set_device("gpu:0" if ON_GPU else "cpu")


def place() -> Any:
    return paddle.CUDAPlace(0) if ON_GPU else paddle.CPUPlace()


def tensor(array: np.ndarray | None, grad: bool = False, at: Any = None) -> Any:
    """The array on the device, by a copy alone. bfloat16 travels as uint16, in NumPy and in Paddle's constructor."""
    if array is None:
        return None
    return paddle.to_tensor(np.ascontiguousarray(array), place=at or place(), stop_gradient=not grad)


def seed_tensor(case: AttentionCase, at: Any = None) -> Any:
    return tensor(np.array([case.seed, case.offset], np.int64), at=at) if case.dropout else None


def options_of(case: AttentionCase, **more: Any) -> dict[str, Any]:
    """Keyword arguments of `flashmask_attention` for the case."""
    return {
        "causal": case.causal,
        "softmax_scale": case.scale,
        "block_mask": tensor(case.block_mask),
        "dropout": case.dropout,
        "fixed_seed_offset": seed_tensor(case),
        "return_softmax_lse": True,
        **more,
    }


def through_paddle(case: AttentionCase, **more: Any) -> dict[str, np.ndarray]:
    """Forward by `flashmask_attention`, gradients by paddle.grad; the results in their storage types."""
    *inputs, dout = case.stored()
    query, key, value = (tensor(array, grad=True) for array in inputs)
    out, lse = paddle_flashmask.flashmask_attention(query, key, value, tensor(case.bounds), **options_of(case, **more))
    assert out.place._equals(query.place)
    assert lse.place._equals(query.place)
    gradients = paddle.grad(out, [query, key, value], grad_outputs=[tensor(dout)])
    return {name: result.numpy() for name, result in zip(NAMES, (out, lse, *gradients), strict=True)}


class Direct:
    """A case on the C entry points of the library that the op is linked to, in memory that Paddle holds."""

    def __init__(self, case: AttentionCase, deterministic: bool = True) -> None:
        self.library = _core.load_library(Path(paddle_flashmask.__file__).parent / "lib" / "libflashmask.so")
        query, key, value, dout = arrays = case.stored()
        shapes = (dout.shape, (case.batch, case.heads_q, case.seqlen_q), query.shape, key.shape, value.shape)
        dtypes = (query.dtype, np.dtype(np.float32), query.dtype, query.dtype, query.dtype)
        self.results = [tensor(not_a_number(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.operands = [tensor(array) for array in arrays]
        self.masks = [tensor(case.bounds), tensor(case.block_mask)]
        self.seed_offset = tensor(np.array([case.seed, case.offset], np.int64))
        out, lse, dq, dk, dv = self.results
        names = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")
        views = dict(zip(names, map(_view, (*self.operands, out, dq, dk, dv)), strict=True))
        bounds, block_mask = (None if mask is None else mask.data_ptr() for mask in self.masks)
        self.params = _core.Params(
            abi_version=_core.ABI_VERSION,
            device=_core.CUDA if ON_GPU else _core.CPU,
            dtype=_core.DTYPES[query.dtype],
            batch=case.batch,
            heads_q=case.heads_q,
            heads_k=case.heads_k,
            heads_mask=next((mask.shape[1] for mask in self.masks if mask is not None), 1),
            seqlen_q=case.seqlen_q,
            seqlen_k=case.seqlen_k,
            head_dim=query.shape[3],
            head_dim_v=value.shape[3],
            causal=case.causal,
            num_bounds=0 if case.bounds is None else case.bounds.shape[3],
            deterministic=deterministic,
            softmax_scale=case.true_scale,
            dropout=case.dropout,
            lse=lse.data_ptr(),
            bounds=bounds,
            block_mask=block_mask,
            seed_offset=self.seed_offset.data_ptr(),
            stream=stream_handle(),
            **views,
        )
        self.forward_bytes = self.library.forward_workspace_bytes(self.params)
        self.backward_bytes = self.library.backward_workspace_bytes(self.params)
        size = max(self.forward_bytes, self.backward_bytes)
        # 0xFF bytes are NaN and huge counts: a kernel that reads what it did not write fails loudly.
        self.workspace = tensor(np.full(max(size, 1), 0xFF, np.uint8))
        self.params.workspace, self.params.workspace_bytes = self.workspace.data_ptr(), size

    def forward(self) -> None:
        self.library.forward(self.params)

    def backward(self) -> None:
        self.library.backward(self.params)


def through_c(case: AttentionCase, deterministic: bool = True) -> dict[str, np.ndarray]:
    """Forward and backward by the C entry points."""
    call = Direct(case, deterministic)
    call.forward()
    call.backward()
    synchronize()
    return {name: result.numpy() for name, result in zip(NAMES, call.results, strict=True)}


def not_a_number(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """NaN everywhere: what a kernel leaves unwritten shows. 0xFF in every byte is NaN in each storage type."""
    return np.full((*shape, dtype.itemsize), 0xFF, np.uint8).view(dtype)[..., 0]


def _view(operand: Any) -> _core.TensorView:
    _, seqlen, heads, head_dim = operand.shape
    strides = (seqlen * heads * head_dim, heads * head_dim, head_dim, 1)
    return _core.tensor_view(operand.data_ptr(), strides)


def stream_handle() -> int | None:
    """The address of Paddle's current stream."""
    return paddle.device.cuda.current_stream().cuda_stream if ON_GPU else None


def synchronize() -> None:
    if ON_GPU:
        paddle.device.cuda.synchronize()


def assert_right(case: AttentionCase, results: dict[str, np.ndarray]) -> dict[str, float]:
    """Against float64: the largest errors are at most twice a naive 16-bit computation's, plus rounding.

    Rows that see nothing are exact zeros, their lse -inf. Returns the relative errors (2-norm).
    """
    want, naive = case.expected(), {} if case.dropout else naive_results(case)
    blind = np.isneginf(want["lse"])
    np.testing.assert_array_equal(np.isneginf(results["lse"]), blind)
    np.testing.assert_allclose(results["lse"][~blind], want["lse"][~blind], rtol=1e-5, atol=1e-5)
    for name in ("out", "dq"):
        assert not loaded(results[name])[blind.swapaxes(1, 2)].any(), f"{name}: a fully masked row is not zero"
    errors = {}
    for name in ("out", "dq", "dk", "dv"):
        got = loaded(results[name]).astype(np.float64)
        assert got.shape == want[name].shape, name
        assert np.isfinite(got).all(), name
        error, largest = np.abs(got - want[name]).max(), np.abs(want[name]).max()
        # Two roundings at the magnitude of the largest value; delta is taken from the rounded output.
        slack = 4 * np.abs(rounded(want[name], case.dtype) - want[name]).max()
        allowed = 2 * np.abs(naive[name] - want[name]).max() + slack if naive else 0.02 * largest
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
        errors[name] = float(np.linalg.norm(got - want[name]) / max(np.linalg.norm(want[name]), 1e-30))
        assert errors[name] < 1.2e-2, f"{name}: relative error {errors[name]:.3g}"
    return errors


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(
            first[name].view(np.uint8), np.ascontiguousarray(second[name]).view(np.uint8), err_msg=name
        )
