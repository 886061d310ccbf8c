"""CUDA rivals: this package's kernels through the C entry points, and PyTorch's attention backends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals import Arrays, Rival
from benchmarks.workloads import Case, documents
from paddle_flashmask import masks


def device_inputs(case: Case) -> list[Any]:
    """query, key, value and the gradient of the output: `[batch, seqlen, heads, head_dim]` on the device.

    Drawn there, from one seed: drawing and copying 131,072 x 4,096 numbers from the host takes longer than the rest.
    """
    import torch

    generator = torch.Generator(device="cuda").manual_seed(20241010)
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    dtype = getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(4)]


class _Cuda(Rival):
    dtypes = ("bfloat16", "float16")
    on_cuda = True

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("there is no CUDA device")
        self.torch = torch

    def versions(self) -> dict[str, Any]:
        return {"torch": self.torch.__version__, "cuda": self.torch.version.cuda}


class Ours(_Cuda):
    name = "ours"

    def prepare(self, case: Case) -> None:
        sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))
        from device_tensors import Call

        query, key, value, grad = device_inputs(case)
        indices, causal = case.indices()
        bounds = None if indices is None else self.torch.from_numpy(np.ascontiguousarray(indices)).cuda()
        self.call = Call(query, key, value, bounds, causal=causal)
        self.call.set_gradient(grad)

    def kernels(self) -> list[str]:
        return [self.call.library.kernel_name(self.call.params, backward) for backward in (False, True)]

    def forward(self) -> None:
        self.out, _ = self.call.forward()

    def backward(self) -> None:
        self.grads = self.call.backward()

    def poison(self) -> None:
        for tensor in (self.call.out, *self.call.gradients):
            tensor.fill_(float("nan"))

    def results(self) -> Arrays:
        return dict(zip(("out", "dq", "dk", "dv"), (self.out, *self.grads), strict=True))


class OursPortable(Ours):
    """The portable kernels, on a device that has its own."""

    name = "ours_sm80"

    def supports(self, case: Case) -> str | None:
        if self.torch.cuda.get_device_capability() != (9, 0):
            return "the device has no other kernels"
        return super().supports(case)

    def prepare(self, case: Case) -> None:
        os.environ["FLASHMASK_FORCE_ARCH"] = "sm80"
        super().prepare(case)


class _Torch(_Cuda):
    """Operands are views `[b, h, s, d]` of memory laid out `[b, s, h, d]`, as a model has them."""

    def prepare(self, case: Case) -> None:
        query, key, value, grad = (tensor.transpose(1, 2) for tensor in device_inputs(case))
        self.inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        self.grad = grad
        self.prepare_mask(case)

    def prepare_mask(self, case: Case) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        self.grads = self.torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)

    def results(self) -> Arrays:
        tensors = dict(zip(("out", "dq", "dk", "dv"), (self.out, *self.grads), strict=True))
        return {name: tensor.detach().transpose(1, 2) for name, tensor in tensors.items()}


class _Sdpa(_Torch):
    backend: str

    def supports(self, case: Case) -> str | None:
        return super().supports(case) or (None if case.mask in ("full", "causal") else "takes no mask")

    def prepare_mask(self, case: Case) -> None:
        self.causal = case.mask == "causal"

    def forward(self) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            self.out = self.torch.nn.functional.scaled_dot_product_attention(*self.inputs, is_causal=self.causal)


class Cudnn(_Sdpa):
    """The roof without a mask: cuDNN's fused attention."""

    name = "sdpa"
    backend = "CUDNN_ATTENTION"


class Flash2(_Sdpa):
    """FlashAttention-2."""

    name = "sdpa_flash"
    backend = "FLASH_ATTENTION"


class Dense(_Torch):
    """scaled_dot_product_attention with a boolean mask tensor."""

    name = "dense"

    def supports(self, case: Case) -> str | None:
        if case.seqlen > 8192:
            return "the dense mask is too large"
        return super().supports(case) or (None if case.mask != "full" else "no mask to hold")

    def prepare_mask(self, case: Case) -> None:
        indices, causal = case.indices()
        self.mask = self.torch.from_numpy(masks.to_dense(indices, causal, case.seqlen)).cuda()

    def forward(self) -> None:
        self.out = self.torch.nn.functional.scaled_dot_product_attention(*self.inputs, attn_mask=self.mask)


class Flex(_Torch):
    """FlexAttention: compiled, its BlockMask built outside the timed region, the mask written as its users would."""

    name = "flex"

    def prepare_mask(self, case: Case) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.torch._dynamo.reset()
        visible = self._visible(case)
        block_mask = None
        if visible is not None:
            block_mask = create_block_mask(
                visible, case.batch, None, case.seqlen, case.seqlen, device="cuda", _compile=True
            )
        self.block_mask = block_mask
        self.attention = self.torch.compile(flex_attention, dynamic=False)
        self.forward()  # compiles
        self.backward()

    def _visible(self, case: Case) -> Callable[..., Any] | None:
        """mask_mod: arithmetic where that is enough, document numbers for documents, row intervals for the rest."""
        torch = self.torch
        window, prefix = case.seqlen // 16, case.seqlen // 2

        def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
            return i >= j

        if case.mask == "full":
            return None
        if case.mask == "causal":
            return causal
        if case.mask == "sliding_window":
            return lambda b, h, i, j: (i >= j) & (i - j < window)
        if case.mask == "global_sliding_window":
            return lambda b, h, i, j: ((i - j <= window) & (j - i <= window)) | (i < 16) | (j < 16)
        if case.mask == "prefix_lm_causal":
            return lambda b, h, i, j: (i >= j) | (j < prefix)
        if case.mask in ("causal_document", "document"):
            numbers = [np.repeat(np.arange(len(row)), row) for row in documents(case)]
            document = torch.from_numpy(np.stack(numbers)).int().cuda()
            if case.mask == "document":
                return lambda b, h, i, j: document[b, i] == document[b, j]
            return lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j])
        indices, is_causal = case.indices()
        bounds = torch.from_numpy(np.ascontiguousarray(indices[:, 0].transpose(0, 2, 1))).cuda()  # [b, n, s]
        if is_causal and bounds.shape[1] == 1:
            return lambda b, h, i, j: (i >= j) & (i < bounds[b, 0, j])
        if is_causal:
            return lambda b, h, i, j: (i >= j) & ((i < bounds[b, 0, j]) | (i >= bounds[b, 1, j]))
        return lambda b, h, i, j: (i < bounds[b, 0, j]) & (i >= bounds[b, 1, j])

    def forward(self) -> None:
        self.out = self.attention(*self.inputs, block_mask=self.block_mask)


class FlashAttention4(_Torch):
    """flash-attn-4 (CuTe DSL), where it is importable."""

    name = "fa4"

    def __init__(self) -> None:
        super().__init__()
        from flash_attn.cute import flash_attn_func

        self.attention = flash_attn_func

    def supports(self, case: Case) -> str | None:
        return super().supports(case) or (None if case.mask in ("full", "causal") else "takes no mask")

    def prepare(self, case: Case) -> None:
        query, key, value, self.grad = device_inputs(case)
        self.inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        self.causal = case.mask == "causal"

    def forward(self) -> None:
        out = self.attention(*self.inputs, causal=self.causal)
        self.out = out[0] if isinstance(out, tuple) else out

    def results(self) -> Arrays:
        tensors = dict(zip(("out", "dq", "dk", "dv"), (self.out, *self.grads), strict=True))
        return {name: tensor.detach() for name, tensor in tensors.items()}


RIVALS = {rival.name: rival for rival in (Ours, OursPortable, Cudnn, Flash2, FlashAttention4, Flex, Dense)}
