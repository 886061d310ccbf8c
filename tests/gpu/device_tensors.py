"""Drives the CUDA kernels of libflashmask.so with PyTorch tensors as carriers: no framework binding is involved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from paddle_flashmask import _core

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = (ROOT / "build" / "cuda" / "libflashmask.so", ROOT / "paddle_flashmask" / "lib" / "libflashmask.so")


def library_path() -> Path | None:
    """$FLASHMASK_LIBRARY, else what `make cuda-lib` built, else the package's library; None if there is none."""
    named = os.environ.get("FLASHMASK_LIBRARY")
    for path in (Path(named),) if named else CANDIDATES:
        if path.exists():
            return path
    return None


def why_not() -> str | None:
    """Why the GPU tests cannot run here, or None if they can."""
    try:
        import torch
    except ImportError:
        return "PyTorch, which carries the device memory, is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if library_path() is None:
        return "no library was built: make cuda-lib, or set FLASHMASK_LIBRARY"
    return None


def architectures() -> list[str]:
    """Values of FLASHMASK_FORCE_ARCH worth testing here: what the device takes by itself, and the portable kernels."""
    import torch

    return ["default", "sm80"] if torch.cuda.get_device_capability() == (9, 0) else ["default"]


def load() -> _core.Library:
    path = library_path()
    assert path is not None
    return _core.load_library(path)


class Call:
    """One attention call on CUDA tensors [b, s, h, d]. Outputs and workspace are made once, so it can be timed.

    Outputs start as NaN: what the kernels leave unwritten shows.
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        bounds: Any = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        offset: int = 0,
        block_mask: Any = None,
        deterministic: bool = False,
        no_skip: bool = False,
        library: _core.Library | None = None,
    ) -> None:
        import torch

        self.library = library or load()
        dtypes = {torch.bfloat16: _core.BFLOAT16, torch.float16: _core.FLOAT16, torch.float32: _core.FLOAT32}
        batch, seqlen_q, heads_q, head_dim = q.shape
        _, seqlen_k, heads_k, head_dim_v = v.shape
        self.inputs = (q, k, v, bounds, block_mask)  # kept alive
        self.out = torch.full((batch, seqlen_q, heads_q, head_dim_v), float("nan"), dtype=q.dtype, device=q.device)
        self.lse = torch.full((batch, heads_q, seqlen_q), float("nan"), device=q.device)
        self.seed_offset = torch.tensor([seed, offset], dtype=torch.int64, device=q.device)
        heads_mask = next((x.shape[1] for x in (bounds, block_mask) if x is not None), 1)
        self.params = _core.Params(
            abi_version=_core.ABI_VERSION,
            device=_core.CUDA,
            dtype=dtypes[q.dtype],
            batch=batch,
            heads_q=heads_q,
            heads_k=heads_k,
            heads_mask=heads_mask,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            causal=causal,
            num_bounds=0 if bounds is None else bounds.shape[3],
            deterministic=deterministic,
            flags=_core.FLAG_NO_SKIP if no_skip else 0,
            softmax_scale=head_dim**-0.5 if scale is None else scale,
            dropout=dropout,
            q=view(q),
            k=view(k),
            v=view(v),
            out=view(self.out),
            lse=self.lse.data_ptr(),
            bounds=None if bounds is None else bounds.data_ptr(),
            block_mask=None if block_mask is None else block_mask.data_ptr(),
            seed_offset=self.seed_offset.data_ptr(),
        )
        self._forward_bytes = self.library.forward_workspace_bytes(self.params)
        self._backward_bytes = self.library.backward_workspace_bytes(self.params)
        self.workspace: Any = None

    def _prepare(self, size: int) -> None:
        import torch

        if self.workspace is None or self.workspace.numel() < size:
            self.workspace = None  # so that both are never there at once
            # 0xFF bytes are NaN, and huge counts: a kernel that reads what it did not write fails loudly.
            self.workspace = torch.full((size,), 255, dtype=torch.uint8, device=self.out.device)
        self.params.workspace = self.workspace.data_ptr() if size else None
        self.params.workspace_bytes = size
        self.params.stream = torch.cuda.current_stream().cuda_stream

    def kernel(self, backward: bool = False) -> str:
        """Such as "cuda sm90 d128"."""
        return self.library.kernel_name(self.params, backward)

    def forward(self) -> tuple[Any, Any]:
        """(out, lse); runs on the current stream."""
        self._prepare(self._forward_bytes)
        self.library.forward(self.params)
        return self.out, self.lse

    def set_gradient(self, dout: Any) -> None:
        import torch

        q, k, v = self.inputs[:3]
        self.dout = dout
        self.gradients = tuple(torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device) for x in (q, k, v))
        self.params.dout = view(dout)
        self.params.dq, self.params.dk, self.params.dv = (view(x) for x in self.gradients)

    def backward(self) -> tuple[Any, Any, Any]:
        """(dq, dk, dv) for the gradient given to `set_gradient`; `forward` ran before."""
        self._prepare(self._backward_bytes)
        self.library.backward(self.params)
        return self.gradients


def view(tensor: Any) -> _core.TensorView:
    return _core.tensor_view(tensor.data_ptr(), tensor.stride())


def fused(q: Any, k: Any, v: Any, bounds: Any, dout: Any, **options: Any) -> dict[str, Any]:
    """Forward and backward: {"out", "lse", "dq", "dk", "dv"}."""
    call = Call(q, k, v, bounds, **options)
    out, lse = call.forward()
    call.set_gradient(dout)
    dq, dk, dv = call.backward()
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
