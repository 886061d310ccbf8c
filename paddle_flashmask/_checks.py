"""Checks of everything in an attention call but the mask, which `masks.validate` checks.

Each error names the argument, what was expected and what came. Sizes that a program knows only at run time are None
here and go unchecked: the op checks them when it runs.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import Any, NamedTuple

import numpy as np
import paddle

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8

# What stands for a tensor while a static program is being built.
_STATIC_TYPES = tuple(
    kind
    for kind in (
        getattr(paddle.static, "Variable", None),
        getattr(getattr(paddle, "pir", None), "Value", None),
    )
    if kind is not None
)
_TENSOR_TYPES = (paddle.Tensor, *_STATIC_TYPES)
_CAST_HINT = {
    "float64": 'cast it: x.astype("float32")',
    "float8_e4m3fn": 'cast it: x.astype("bfloat16")',
    "float8_e5m2": 'cast it: x.astype("bfloat16")',
}
_FLOATS = ("float32", "bfloat16", "float16")
_GPU_FLOATS = ("bfloat16", "float16")


class Sizes(NamedTuple):
    """Sizes of a call; None for one that is known only at run time."""

    batch: int | None
    seqlen_q: int | None
    seqlen_k: int | None
    heads_q: int | None
    heads_k: int | None
    head_dim: int | None
    head_dim_v: int | None


def dtype_name(tensor: Any) -> str:
    """The dtype as "float32", "int64" and so on: Paddle prints it as `paddle.float32`."""
    return str(tensor.dtype).rsplit(".", 1)[-1]


def shown(value: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, _TENSOR_TYPES):
        return f"{dtype_name(value)} tensor of shape {list(value.shape)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def tensor(name: str, value: Any) -> None:
    """Refuses what is no dense Paddle tensor."""
    if not isinstance(value, _TENSOR_TYPES):
        raise TypeError(f"{name}: expected a paddle.Tensor, got {shown(value)}")
    if paddle.in_dynamic_mode():
        if not value.is_dense():
            raise TypeError(f"{name}: expected a dense paddle.Tensor, got a sparse or distributed one")
        if not value._is_initialized() and 0 not in value.shape:
            raise ValueError(f"{name}: expected a paddle.Tensor that holds data, got one whose memory was released")


def boolean(name: str, value: Any) -> bool:
    """`value` as bool. Numbers are refused: 1 for True is more often a misplaced argument."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def real(name: str, value: Any) -> float:
    """`value` as float, rounded to the float32 that the op computes with."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a float, got {shown(value)}")
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except OverflowError:  # an integer beyond float64
        return math.inf


def string(name: str, value: Any) -> str:
    """`value` if it is a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {shown(value)}")
    return value


def dropout(value: Any) -> float:
    """The dropout probability, in [0, 1]."""
    probability = real("dropout", value)
    if not 0.0 <= probability <= 1.0:  # false for NaN
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {value!r}")
    return probability


def softmax_scale(value: Any) -> float:
    """The factor of the scores: finite, also as float32."""
    scale = real("softmax_scale", value)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale: expected a finite float32, got {value!r}")
    return scale


def seed_offset(value: Any) -> None:
    """`fixed_seed_offset`: int64 `[2]`, on any device."""
    tensor("fixed_seed_offset", value)
    if dtype_name(value) != "int64":
        raise TypeError(f"fixed_seed_offset: expected an int64 tensor of shape [2], got {shown(value)}")
    if list(value.shape) not in ([2], [-1]):
        raise ValueError(f"fixed_seed_offset: expected an int64 tensor of shape [2], got {shown(value)}")


def qkv_dtypes(query: Any, key: Any, value: Any) -> None:
    """One dtype for all three, and one that there are kernels for."""
    for name, operand in (("query", query), ("key", key), ("value", value)):
        dtype = dtype_name(operand)
        if dtype not in _FLOATS:
            hint = f"; {_CAST_HINT[dtype]}" if dtype in _CAST_HINT else ""
            raise TypeError(f"{name}.dtype: expected float32, bfloat16 or float16, got {dtype}{hint}")
    for name, operand in (("key", key), ("value", value)):
        if dtype_name(operand) != dtype_name(query):
            raise TypeError(
                f"{name}.dtype: expected that of query, {dtype_name(query)}, got {dtype_name(operand)}; cast one of "
                "them (paddle.amp.auto_cast does, where it is on)"
            )


def same_device(query: Any, others: dict[str, Any | None]) -> None:
    """All tensors on the device of `query`. Static programs place their tensors when they run."""
    if not paddle.in_dynamic_mode():
        return
    for name, other in others.items():
        if other is not None and str(other.place) != str(query.place):
            raise ValueError(f"{name}: expected a tensor on the device of query, {query.place}, got {other.place}")


def dtype_on_gpu(query: Any) -> None:
    """There are no float32 kernels for GPUs. Of a static program the op says so when it runs."""
    dtype = dtype_name(query)
    if dtype not in _GPU_FLOATS and paddle.in_dynamic_mode() and query.place.is_gpu_place():
        raise TypeError(
            f"query.dtype: expected bfloat16 or float16 on a GPU, got {dtype}; cast query, key and value "
            "(paddle.amp.auto_cast does, where it is on)"
        )


def qkv_sizes(query: Any, key: Any, value: Any) -> Sizes:
    """Checks the shapes of query, key and value against each other."""
    shapes = {}
    layouts = {
        "query": (query, "[batch, seqlen_q, heads_q, head_dim]"),
        "key": (key, "[batch, seqlen_k, heads_k, head_dim]"),
        "value": (value, "[batch, seqlen_k, heads_k, head_dim_v]"),
    }
    for name, (operand, layout) in layouts.items():
        shape = [int(size) for size in operand.shape]
        if len(shape) != 4:
            raise ValueError(f"{name}: expected rank 4, {layout}, got shape {shape}")
        for axis, size in enumerate(shape):
            if size == 0:
                raise ValueError(f"{name}.shape[{axis}]: expected at least 1, got 0 (shape {shape}, {layout})")
        shapes[name] = [None if size < 0 else size for size in shape]
    q, k, v = shapes.values()
    _equal("key.shape[0]", k[0], "the batch size of query", q[0])
    _equal("value.shape[0]", v[0], "the batch size of query", q[0])
    _equal("key.shape[3]", k[3], "the head dim of query", q[3])
    _equal("value.shape[1]", v[1], "the sequence length of key", k[1])
    _equal("value.shape[2]", v[2], "the number of heads of key", k[2])
    for name, head_dim in (("query", q[3]), ("value", v[3])):
        if head_dim is not None and (head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM):
            raise ValueError(
                f"{name}.shape[3]: expected a head dim that is a multiple of {HEAD_DIM_STEP}, at most {MAX_HEAD_DIM}, "
                f"got {head_dim}"
            )
    if q[2] is not None and k[2] is not None and q[2] % k[2]:
        raise ValueError(f"query.shape[2]: expected a multiple of the {k[2]} heads of key, got {q[2]} heads")
    return Sizes(q[0], q[1], k[1], q[2], k[2], q[3], v[3])


def _equal(what: str, size: int | None, meaning: str, expected: int | None) -> None:
    if size is not None and expected is not None and size != expected:
        raise ValueError(f"{what}: expected {meaning}, {expected}, got {size}")
