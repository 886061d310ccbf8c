"""Times the CUDA kernels of this package, of one or several builds, beside PyTorch's FLASH_ATTENTION backend.

    python -m benchmarks.cuda.compare --library build/cuda/libflashmask.so --masks causal,full,causal_document
    python -m benchmarks.cuda.compare --library before.so --library after.so --what backward --head-dims 64

One process, call by call: all take turns within every round, so that a per cent of difference can be seen. Printed are
ms, TFLOPs/s by tile (the work of every 128x128 tile that is not fully masked; backward counts 2.5 times the forward
pass), and the speed over the first library's. For a quick look while changing kernels: the figures that are published
come from benchmarks/kernels.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda.timing import alternating_medians_ms, random_inputs
from benchmarks.workloads import MASKS, Case
from paddle_flashmask import _core

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))
from device_tensors import Call

WHAT = ("forward", "backward", "deterministic")  # the last is the backward pass that repeats to the bit


def ours(library: _core.Library, case: Case, inputs: list[Any], what: str) -> Callable[[], Any]:
    """A call of one of WHAT, ready to be timed."""
    q, k, v, dout = inputs
    indices, causal = case.indices()
    bounds = None if indices is None else torch.from_numpy(np.ascontiguousarray(indices)).cuda()
    call = Call(q, k, v, bounds, causal=causal, library=library, deterministic=what == "deterministic")
    call.set_gradient(dout)
    call.forward()
    return call.forward if what == "forward" else call.backward


def flash_attention_2(case: Case, inputs: list[Any], what: str) -> Callable[[], Any]:
    """PyTorch's FLASH_ATTENTION backend, for the masks `causal` and `full`, forward or backward."""
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs[:3])
    gradient = inputs[3].transpose(1, 2)

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.mask == "causal")

    out = forward()
    return forward if what == "forward" else lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", required=True, help="libflashmask.so; may be given repeatedly")
    parser.add_argument("--masks", default="causal,full", help="comma-separated, or 'all'")
    parser.add_argument("--what", default="forward,backward", help=f"comma-separated, of {', '.join(WHAT)}")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32768, help="batch * seqlen; heads * head_dim is 4096")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each figure")
    args = parser.parse_args()
    if unknown := set(args.what.split(",")) - set(WHAT):
        parser.error(f"--what: expected some of {', '.join(WHAT)}, got {', '.join(sorted(unknown))}")
    masks = MASKS if args.masks == "all" else args.masks.split(",")
    if unknown := set(masks) - set(MASKS):
        parser.error(f"--masks: expected some of {', '.join(MASKS)}, got {', '.join(sorted(unknown))}")
    libraries = {path: _core.load_library(path) for path in args.library}
    print(torch.cuda.get_device_name())
    for head_dim in map(int, args.head_dims.split(",")):
        batch, heads = max(1, args.tokens // args.seqlen), 4096 // head_dim
        inputs = random_inputs(batch, args.seqlen, heads, head_dim)
        for mask in masks:
            case = Case(mask, args.seqlen, head_dim, heads, batch, "bfloat16")
            for what in args.what.split(","):
                calls = {path: ours(library, case, inputs, what) for path, library in libraries.items()}
                if mask in ("causal", "full") and what != "deterministic":
                    calls["flash-attention-2"] = flash_attention_2(case, inputs, what)
                times = alternating_medians_ms(list(calls.values()), args.seconds)
                gigaflops = case.forward_flops() * case.area()[1] / 1e9 * (1 if what == "forward" else 2.5)
                for name, milliseconds in zip(calls, times, strict=True):
                    print(
                        f"d={head_dim} {mask:22s} {what:14s} {name:40s} {milliseconds:9.3f} ms"
                        f" {gigaflops / milliseconds:4.0f} TFLOPs/s {times[0] / milliseconds:6.3f}x",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
