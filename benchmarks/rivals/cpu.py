"""CPU rivals: this package's kernels, PyTorch's attention, Paddle's dense-mask attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.rivals import Arrays, Rival
from benchmarks.workloads import Case
from paddle_flashmask import masks


def dense_visible(case: Case) -> np.ndarray | None:
    """bool `[batch or 1, 1, seqlen, seqlen]`, True = visible."""
    indices, causal = case.indices()
    return masks.to_dense(indices, causal, case.seqlen)


class Ours(Rival):
    name = "ours"
    dtypes = ("float32", "bfloat16", "float16")

    def prepare(self, case: Case) -> None:
        from paddle_flashmask import _core

        self.core = _core
        convert = {
            "float32": lambda x: x,
            "bfloat16": _core.to_bf16,
            "float16": lambda x: x.astype(np.float16),
        }[case.dtype]
        self.bf16 = case.dtype == "bfloat16"
        self.query, self.key, self.value, self.grad = (convert(array) for array in case.inputs())
        self.indices, self.causal = case.indices()

    def forward(self) -> None:
        self.out, self.lse = self.core.forward(self.query, self.key, self.value, self.indices, causal=self.causal)

    def backward(self) -> None:
        self.grads = self.core.backward(
            self.query, self.key, self.value, self.out, self.lse, self.grad, self.indices, causal=self.causal
        )

    def results(self) -> Arrays:
        convert = self.core.from_bf16 if self.bf16 else (lambda x: x.astype(np.float32))
        return dict(zip(("out", "dq", "dk", "dv"), map(convert, (self.out, *self.grads)), strict=True))

    def versions(self) -> dict[str, Any]:
        return {"isa": self.core.load_library().cpu_isa()}


class _Torch(Rival):
    def __init__(self) -> None:
        import torch

        self.torch = torch

    def versions(self) -> dict[str, Any]:
        return {"torch": self.torch.__version__, "threads": self.torch.get_num_threads()}

    def prepare(self, case: Case) -> None:
        torch = self.torch
        self.case = case
        # [b, s, h, d] -> [b, h, s, d], the layout that PyTorch's kernels want; contiguous, as a model would hold it.
        query, key, value, grad = (
            torch.from_numpy(np.ascontiguousarray(array.transpose(0, 2, 1, 3))) for array in case.inputs()
        )
        self.inputs = [tensor.requires_grad_(self.has_backward) for tensor in (query, key, value)]
        self.grad = grad
        self.prepare_mask(case)

    def prepare_mask(self, case: Case) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        self.grads = self.torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)

    def results(self) -> Arrays:
        tensors = {"out": self.out}
        if self.has_backward:
            tensors |= dict(zip(("dq", "dk", "dv"), self.grads, strict=True))
        return {name: tensor.detach().numpy().transpose(0, 2, 1, 3) for name, tensor in tensors.items()}


class TorchSdpa(_Torch):
    """scaled_dot_product_attention without a mask tensor: what the machine does when nothing is masked."""

    name = "sdpa"

    def supports(self, case: Case) -> str | None:
        return super().supports(case) or (None if case.mask in ("full", "causal") else "takes no mask")

    def prepare_mask(self, case: Case) -> None:
        self.causal = case.mask == "causal"

    def forward(self) -> None:
        self.out = self.torch.nn.functional.scaled_dot_product_attention(*self.inputs, is_causal=self.causal)


class TorchDense(_Torch):
    """scaled_dot_product_attention with a boolean mask tensor."""

    name = "dense"

    def supports(self, case: Case) -> str | None:
        return super().supports(case) or (None if case.mask != "full" else "no mask to hold")

    def prepare_mask(self, case: Case) -> None:
        self.mask = self.torch.from_numpy(dense_visible(case))

    def forward(self) -> None:
        self.out = self.torch.nn.functional.scaled_dot_product_attention(*self.inputs, attn_mask=self.mask)


class TorchFlex(_Torch):
    """FlexAttention, compiled, its BlockMask built outside the timed region. On a CPU it has no backward pass."""

    name = "flex"
    has_backward = False

    def prepare_mask(self, case: Case) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        dense = self.torch.from_numpy(dense_visible(case))
        batches = dense.shape[0]

        def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
            return dense[batch % batches, 0, row, column]

        self.block_mask = create_block_mask(visible, case.batch, None, case.seqlen, case.seqlen, device="cpu")
        self.attention = self.torch.compile(flex_attention, dynamic=False)
        self.forward()  # compiles

    def forward(self) -> None:
        self.out = self.attention(*self.inputs, block_mask=self.block_mask)


class PaddleDense(Rival):
    """Paddle's scaled_dot_product_attention with a float mask: what PaddleNLP trains with without FlashMask."""

    name = "paddle_dense"

    def __init__(self) -> None:
        import paddle

        paddle.set_device("cpu")
        self.paddle = paddle

    def versions(self) -> dict[str, Any]:
        return {"paddle": self.paddle.__version__}

    def prepare(self, case: Case) -> None:
        query, key, value, grad = (self.paddle.to_tensor(array) for array in case.inputs())
        self.inputs = [query, key, value]
        for tensor in self.inputs:
            tensor.stop_gradient = False
        self.grad = grad
        visible = dense_visible(case)
        self.mask = self.paddle.to_tensor(np.where(visible, 0.0, np.finfo(np.float32).min).astype(np.float32))

    def forward(self) -> None:
        self.out = self.paddle.nn.functional.scaled_dot_product_attention(*self.inputs, attn_mask=self.mask)

    def backward(self) -> None:
        self.grads = self.paddle.grad([self.out], self.inputs, [self.grad], retain_graph=True)

    def results(self) -> Arrays:
        tensors = dict(zip(("out", "dq", "dk", "dv"), (self.out, *self.grads), strict=True))
        return {name: tensor.numpy() for name, tensor in tensors.items()}


RIVALS = {rival.name: rival for rival in (Ours, TorchSdpa, TorchDense, TorchFlex, PaddleDense)}
