"""Drives libflashmask.so from NumPy arrays, or from raw pointers, by ctypes. No Paddle is imported.

`forward` and `backward` take arrays on the CPU. A caller with device memory of its own (another array library, CUDA)
fills `Params` itself, with `tensor_view` for the operands, and passes it to `Library.forward` and `Library.backward`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ABI_VERSION = 1
INT32_MAX = 2**31 - 1

CPU, CUDA = 0, 1
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
ISA = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
FLAG_NO_SKIP = 1  # compute and mask every tile: the result must equal the default's to the bit

# bfloat16 has no NumPy type: it travels as the upper halves of float32 in uint16.
DTYPES = {np.dtype(np.float32): FLOAT32, np.dtype(np.uint16): BFLOAT16, np.dtype(np.float16): FLOAT16}

Array = npt.NDArray[Any]


class TensorView(ctypes.Structure):
    """FlashmaskTensor of flashmask.h: strides count elements, the last axis is contiguous."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("seq_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class Params(ctypes.Structure):
    """FlashmaskParams of flashmask.h, field by field."""

    _fields_ = (
        ("abi_version", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_k", ctypes.c_int32),
        ("heads_mask", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_k", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("head_dim_v", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("num_bounds", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("dropout", ctypes.c_float),
        ("q", TensorView),
        ("k", TensorView),
        ("v", TensorView),
        ("out", TensorView),
        ("lse", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("block_mask", ctypes.c_void_p),
        ("seed_offset", ctypes.c_void_p),
        ("dout", TensorView),
        ("dq", TensorView),
        ("dk", TensorView),
        ("dv", TensorView),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("num_threads", ctypes.c_int32),
        ("cpu_isa", ctypes.c_int32),
    )


class Library:
    """libflashmask.so with typed entry points; a status other than OK becomes an exception."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._library = library = ctypes.CDLL(str(path))
        params = ctypes.POINTER(Params)
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "flashmask_abi_version": (ctypes.c_int32, []),
            "flashmask_params_bytes": (ctypes.c_int64, []),
            "flashmask_last_error": (ctypes.c_char_p, []),
            "flashmask_cpu_isa": (ctypes.c_char_p, []),
            "flashmask_kernel_name": (ctypes.c_char_p, [params, ctypes.c_int32]),
            "flashmask_forward_workspace_bytes": (ctypes.c_int64, [params]),
            "flashmask_backward_workspace_bytes": (ctypes.c_int64, [params]),
            "flashmask_forward": (ctypes.c_int32, [params]),
            "flashmask_backward": (ctypes.c_int32, [params]),
            "flashmask_dropout_keep_mask": (
                ctypes.c_float,
                [ctypes.c_float, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int32] * 5, ctypes.c_void_p],
            ),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        layout = (library.flashmask_abi_version(), library.flashmask_params_bytes())
        if layout != (ABI_VERSION, ctypes.sizeof(Params)):
            raise ImportError(
                f"{path}: expected interface version {ABI_VERSION} with {ctypes.sizeof(Params)} bytes of parameters, "
                f"got version {layout[0]} with {layout[1]} bytes; rebuild it"
            )

    def cpu_isa(self) -> str:
        """The instruction set that "auto" takes on this machine: "avx512", "avx2" or "portable"."""
        return str(self._library.flashmask_cpu_isa().decode())

    def kernel_name(self, params: Params, backward: bool = False) -> str:
        """Which kernels a call runs on this machine, such as "cpu avx512" or "cuda sm90 d128".

        Raises:
            NotImplementedError: none; the message says why.
        """
        name = self._library.flashmask_kernel_name(ctypes.byref(params), backward)
        if name is None:
            raise NotImplementedError(self._error())
        return str(name.decode())

    def forward_workspace_bytes(self, params: Params) -> int:
        """Bytes of workspace that `forward` needs on the device."""
        return self._bytes(self._library.flashmask_forward_workspace_bytes(ctypes.byref(params)))

    def backward_workspace_bytes(self, params: Params) -> int:
        """Bytes of workspace that `backward` needs on the device."""
        return self._bytes(self._library.flashmask_backward_workspace_bytes(ctypes.byref(params)))

    def forward(self, params: Params) -> None:
        """Runs the forward pass, or puts it on `params.stream`."""
        self._check(self._library.flashmask_forward(ctypes.byref(params)))

    def backward(self, params: Params) -> None:
        """Runs the backward pass, or puts it on `params.stream`."""
        self._check(self._library.flashmask_backward(ctypes.byref(params)))

    def dropout_keep_mask(
        self,
        dropout: float,
        seed: int,
        offset: int,
        batch_index: int,
        head_index: int,
        heads_q: int,
        seqlen_q: int,
        seqlen_k: int,
    ) -> tuple[npt.NDArray[np.bool_], float]:
        """(keep, factor): which scores of a head are kept, bool `[seqlen_q, seqlen_k]`, and what they are scaled by.

        Raises:
            ValueError: a bad argument.
        """
        numbers = {
            "batch_index": batch_index,
            "head_index": head_index,
            "heads_q": heads_q,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
        }
        for name, number in numbers.items():
            # ctypes would drop the upper bits of a larger one, and the array below can have no negative length.
            if not 0 <= number <= INT32_MAX:
                raise ValueError(f"{name}: expected a number from 0 to {INT32_MAX}, got {number}")
        keep = np.empty((seqlen_q, seqlen_k), np.uint8)
        factor = self._library.flashmask_dropout_keep_mask(dropout, seed, offset, *numbers.values(), keep.ctypes.data)
        if math.isnan(factor):
            raise ValueError(self._error())
        return keep.astype(bool), float(factor)

    def _error(self) -> str:
        return str(self._library.flashmask_last_error().decode())

    def _bytes(self, size: int) -> int:
        if size < 0:
            raise ValueError(self._error())
        return size

    def _check(self, status: int) -> None:
        if status == 0:
            return
        exceptions: dict[int, type[Exception]] = {1: ValueError, 2: NotImplementedError, 4: MemoryError}
        raise exceptions.get(status, RuntimeError)(self._error())


@functools.cache
def _load(path: str) -> Library:
    return Library(path)


def load_library(path: str | os.PathLike[str] | None = None) -> Library:
    """The library at `path`; else at $FLASHMASK_LIBRARY; else the one built into the package. Loaded once.

    Raises:
        ImportError: there is none, or it was built for another layout of the parameters.
    """
    chosen = Path(path or os.environ.get("FLASHMASK_LIBRARY") or Path(__file__).parent / "lib" / "libflashmask.so")
    if not chosen.exists():
        raise ImportError(
            f"{chosen} does not exist; build it: pip install --no-build-isolation . (or set FLASHMASK_LIBRARY)"
        )
    return _load(str(chosen.resolve()))


def to_bf16(array: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float32 to bfloat16 in uint16, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(array, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's mantissa could round over into the exponent or down to infinity.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(array: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 in uint16 to float32, exactly."""
    if array.dtype != np.uint16:
        raise TypeError(f"array: expected bfloat16 in uint16, got {array.dtype}")
    return (array.astype(np.uint32) << 16).view(np.float32)


def tensor_view(address: int, strides: tuple[int, ...]) -> TensorView:
    """An operand `[batch, seqlen, heads, head_dim]` at `address`; `strides` count elements, the last must be 1."""
    if len(strides) != 4 or strides[3] != 1:
        raise ValueError(f"strides: expected four, the last of them 1, got {strides}")
    return TensorView(address, *strides[:3])


def _view(array: Array) -> TensorView:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return tensor_view(array.ctypes.data, (*strides[:3], 1 if array.shape[3] == 1 else strides[3]))


def _operand(name: str, array: Array) -> Array:
    """`array` with a contiguous last axis; copied only if it has none."""
    if array.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16 in uint16, got {array.dtype}")
    if array.ndim != 4:
        raise ValueError(f"{name}: expected [batch, seqlen, heads, head_dim], got shape {list(array.shape)}")
    return array if array.strides[3] == array.itemsize else np.ascontiguousarray(array)


def _int32(name: str, array: Array) -> Array:
    if array.dtype != np.int32 or array.ndim != 4:
        raise TypeError(f"{name}: expected int32 of rank 4, got {array.dtype} of shape {list(array.shape)}")
    return np.ascontiguousarray(array)


class _Call:
    """A `Params` for NumPy operands, and the arrays that its pointers point into."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        bounds: Array | None,
        block_mask: Array | None,
        causal: bool,
        scale: float | None,
        dropout: float,
        seed: int,
        offset: int,
        num_threads: int,
        isa: str,
        flags: int,
    ) -> None:
        if isa not in ISA:
            raise ValueError(f"isa: expected one of {', '.join(ISA)}, got {isa!r}")
        q, k, v = (_operand(name, array) for name, array in (("q", q), ("k", k), ("v", v)))
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        batch, seqlen_q, heads_q, head_dim = q.shape
        _, seqlen_k, heads_k, head_dim_v = v.shape
        if k.shape != (batch, seqlen_k, heads_k, head_dim) or v.shape[0] != batch:
            raise ValueError(f"q, k, v: shapes do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
        # What else the mask's shape must obey, the library checks.
        if bounds is not None and (bounds.ndim != 4 or bounds.shape[::2] != (batch, seqlen_k)):
            raise ValueError(f"bounds: expected [{batch}, heads_mask, {seqlen_k}, n], got {list(bounds.shape)}")
        heads_mask = 1 if bounds is None else bounds.shape[1]
        if block_mask is not None:
            heads_mask = heads_mask if bounds is not None or block_mask.ndim != 4 else block_mask.shape[1]
            expected = (batch, heads_mask, -(-seqlen_q // 128), -(-seqlen_k // 128))
            if block_mask.shape != expected:
                raise ValueError(f"block_mask: expected {list(expected)}, got {list(block_mask.shape)}")
        self.q, self.k, self.v = q, k, v
        self.bounds = None if bounds is None else _int32("bounds", bounds)
        self.block_mask = None if block_mask is None else _int32("block_mask", block_mask)
        self.seed_offset = np.array([seed, offset], np.int64)
        self.workspace = np.empty(0, np.uint8)
        self.out_shape = (batch, seqlen_q, heads_q, head_dim_v)
        self.lse_shape = (batch, heads_q, seqlen_q)
        self.params = Params(
            abi_version=ABI_VERSION,
            device=CPU,
            dtype=DTYPES[q.dtype],
            batch=batch,
            heads_q=heads_q,
            heads_k=heads_k,
            heads_mask=heads_mask,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            causal=causal,
            num_bounds=0 if self.bounds is None else self.bounds.shape[3],
            flags=flags,
            softmax_scale=head_dim**-0.5 if scale is None else scale,
            dropout=dropout,
            q=_view(q),
            k=_view(k),
            v=_view(v),
            bounds=None if self.bounds is None else self.bounds.ctypes.data,
            block_mask=None if self.block_mask is None else self.block_mask.ctypes.data,
            seed_offset=self.seed_offset.ctypes.data,
            num_threads=num_threads,
            cpu_isa=ISA[isa],
        )

    def allocate_workspace(self, size: int) -> None:
        self.workspace = np.empty(size, np.uint8)
        self.params.workspace = self.workspace.ctypes.data if size else None
        self.params.workspace_bytes = size


def forward(
    q: Array,
    k: Array,
    v: Array,
    bounds: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    block_mask: Array | None = None,
    num_threads: int = 0,
    isa: str = "auto",
    flags: int = 0,
    library: Library | None = None,
) -> tuple[Array, npt.NDArray[np.float32]]:
    """The CPU forward pass.

    Args:
        q: `[batch, seqlen_q, heads_q, head_dim]`, float32, float16 or bfloat16 in uint16 (`to_bf16`); any strides.
        k, v: `[batch, seqlen_k, heads_k, head_dim or head_dim_v]`, the same dtype.
        bounds: int32 `[batch, heads_mask, seqlen_k, n]`, the `startend_row_indices` of the attention call, or None.
        scale: factor of the scores; None is `head_dim ** -0.5`.
        block_mask: int32 `[batch, heads_mask, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]`, 0 masks a block; or None.
        num_threads: 0 takes the OpenMP runtime's setting.
        isa: "auto", "portable", "avx2" or "avx512".
        flags: `FLAG_NO_SKIP` or 0.
        library: None takes `load_library()`.

    Returns:
        out: `[batch, seqlen_q, heads_q, head_dim_v]` in the dtype of q.
        lse: float32 `[batch, heads_q, seqlen_q]`, natural logarithm.

    Raises:
        TypeError, ValueError: a bad argument. NotImplementedError: the library holds no such kernel.
    """
    library = library or load_library()
    call = _Call(q, k, v, bounds, block_mask, causal, scale, dropout, seed, offset, num_threads, isa, flags)
    out = np.empty(call.out_shape, q.dtype)
    lse = np.empty(call.lse_shape, np.float32)
    call.params.out, call.params.lse = _view(out), lse.ctypes.data
    call.allocate_workspace(library.forward_workspace_bytes(call.params))
    library.forward(call.params)
    return out, lse


def backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: npt.NDArray[np.float32],
    dout: Array,
    bounds: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    block_mask: Array | None = None,
    num_threads: int = 0,
    isa: str = "auto",
    flags: int = 0,
    library: Library | None = None,
) -> tuple[Array, Array, Array]:
    """The CPU backward pass: `(dq, dk, dv)`, shaped and typed as q, k and v.

    `out` and `lse` are what `forward` returned for the same other arguments; `dout` is the gradient of `out`.
    """
    library = library or load_library()
    call = _Call(q, k, v, bounds, block_mask, causal, scale, dropout, seed, offset, num_threads, isa, flags)
    out, dout = _operand("out", out), _operand("dout", dout)
    for name, array in (("out", out), ("dout", dout)):
        if array.shape != call.out_shape or array.dtype != q.dtype:
            raise ValueError(
                f"{name}: expected {q.dtype} {list(call.out_shape)}, got {array.dtype} {list(array.shape)}"
            )
    if lse.shape != call.lse_shape or lse.dtype != np.float32:
        raise ValueError(f"lse: expected float32 {list(call.lse_shape)}, got {lse.dtype} {list(lse.shape)}")
    lse = np.ascontiguousarray(lse)
    dq, dk, dv = (np.empty(array.shape, array.dtype) for array in (q, k, v))
    call.params.out, call.params.dout, call.params.lse = _view(out), _view(dout), lse.ctypes.data
    call.params.dq, call.params.dk, call.params.dv = _view(dq), _view(dk), _view(dv)
    call.allocate_workspace(library.backward_workspace_bytes(call.params))
    library.backward(call.params)
    return dq, dk, dv
