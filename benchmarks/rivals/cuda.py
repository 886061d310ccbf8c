"""CUDA rivals: this package's kernels through the C entry points, and PyTorch's attention backends."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.rivals import Arrays, Rival
from benchmarks.workloads import Case, documents
from paddle_flashmask import masks

GPU_TESTS = str(Path(__file__).resolve().parents[2] / "tests" / "gpu")


def device_inputs(case: Case, shared: bool = False) -> list[Any]:
    """query, key, value and the gradient of the output: `[batch, seqlen, heads, head_dim]` on the device.

    Drawn there, from one seed: drawing and copying 131,072 x 4,096 numbers from the host takes longer than the rest.
    `shared`: four views of one tensor, for compilation, where many processes share a device and values do not matter.
    """
    import torch

    generator = torch.Generator(device="cuda").manual_seed(20241010)
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    dtype = getattr(torch, case.dtype)
    if shared:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
        return [values.view(shape) for _ in range(4)]
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

    def release(self) -> None:
        for name in ("call", "inputs", "grad", "mask", "out", "grads"):
            vars(self).pop(name, None)
        gc.collect()
        self.torch.cuda.empty_cache()


class Ours(_Cuda):
    name = "ours"
    options: ClassVar[dict[str, Any]] = {}

    def prepare(self, case: Case) -> None:
        if GPU_TESTS not in sys.path:
            sys.path.append(GPU_TESTS)
        from device_tensors import Call

        query, key, value, grad = device_inputs(case)
        indices, causal = case.indices()
        bounds = None if indices is None else self.torch.from_numpy(np.ascontiguousarray(indices)).cuda()
        self.call = Call(query, key, value, bounds, causal=causal, **self.options)
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


class OursDeterministic(Ours):
    """With the backward pass that repeats to the bit; the forward pass is the same."""

    name = "ours_deterministic"
    options: ClassVar[dict[str, Any]] = {"deterministic": True}


class _Torch(_Cuda):
    """Operands are views `[b, h, s, d]` of memory laid out `[b, s, h, d]`, as a model has them."""

    def prepare(self, case: Case, shared: bool = False) -> None:
        query, key, value, grad = (tensor.transpose(1, 2) for tensor in device_inputs(case, shared))
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


def block_mask(visible: Callable[..., Any], case: Case, device: str = "cuda", elements: int = 1 << 26) -> Any:
    """FlexAttention's BlockMask of a mask function: what create_block_mask makes, but some rows at a time. That one
    needs bytes for all scores, or a compilation of its own for every case."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    batch, seqlen, size = case.batch, case.seqlen, 128
    index = torch.arange(max(batch, seqlen), dtype=torch.int32, device=device)
    rows = size * max(1, elements // (batch * size * seqlen))
    counts = []
    for first in range(0, seqlen, rows):
        row = index[first : min(first + rows, seqlen), None]
        seen = visible(index[:batch, None, None], 0, row, index[None, :seqlen]).expand(batch, len(row), seqlen)
        counts.append(seen.unflatten(1, (-1, size)).unflatten(3, (-1, size)).sum((2, 4)))
    visible_pairs = torch.cat(counts, 1)[:, None]  # [batch, 1, seqlen / 128, seqlen / 128]

    def ordered(chosen: Any) -> tuple[Any, Any]:
        order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
        return chosen.sum(-1).int(), order.int()

    full = visible_pairs == size * size
    partial = (visible_pairs > 0) & ~full
    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(seqlen, seqlen)
    )


class Flex(_Torch):
    """FlexAttention: compiled, its BlockMask built outside the timed region, the mask written as its users would."""

    name = "flex"

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.attention.flex_attention import flex_attention

        # One compiled variant a case; above the limit it would run uncompiled.
        self.torch._dynamo.config.recompile_limit = 1000
        self.torch._dynamo.config.accumulated_recompile_limit = 1000
        self.attention = self.torch.compile(flex_attention, dynamic=False)
        self.block_masks: dict[Case, Any] = {}

    # Masks whose functions need no bounds; the others' functions are the same for the same number of bounds.
    OWN_FUNCTION = (
        "full",
        "causal",
        "sliding_window",
        "global_sliding_window",
        "prefix_lm_causal",
        "causal_document",
        "document",
    )

    @staticmethod
    def variant(case: Case) -> Hashable:
        if case.mask in Flex.OWN_FUNCTION:
            return case
        indices, causal = case.indices()
        return replace(case, mask=f"{indices.shape[-1]} bounds, causal: {causal}")

    def compile(self, case: Case) -> None:
        self.prepare(case, shared=True)
        self.forward()
        self.backward()

    def prepare_mask(self, case: Case) -> None:
        if case not in self.block_masks:
            visible = self._visible(case)
            # The same function each time, since the compiled code is bound to it; off the device, which others need.
            self.block_masks[case] = None if visible is None else block_mask(visible, case).to("cpu")
        self.mask = self.block_masks[case]
        if self.mask is not None:
            self.mask = self.mask.to("cuda")

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
        self.out = self.attention(*self.inputs, block_mask=self.mask)


class FlashAttention4(_Torch):
    """flash-attn-4 (CuTe DSL), where it is importable."""

    name = "fa4"

    def __init__(self) -> None:
        super().__init__()
        from flash_attn.cute import flash_attn_func

        self.attention = flash_attn_func

    def supports(self, case: Case) -> str | None:
        return super().supports(case) or (None if case.mask in ("full", "causal") else "takes no mask")

    @staticmethod
    def variant(case: Case) -> Hashable:
        return case.mask, case.head_dim

    def compile(self, case: Case) -> None:
        self.prepare(replace(case, batch=1))  # its code takes any batch
        self.forward()
        self.backward()

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


RIVALS = {
    rival.name: rival for rival in (Ours, OursPortable, OursDeterministic, Cudnn, Flash2, FlashAttention4, Flex, Dense)
}
