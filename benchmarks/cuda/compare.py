"""Times the CUDA kernels of this package, of one or several builds, beside PyTorch's FLASH_ATTENTION backend.

    python -m benchmarks.cuda.compare --library build/cuda/libflashmask.so --masks causal,full,causal_document

One process, one run, so that the figures share the card's temperature; a table of ms and TFLOPs/s by tile (the work of
every 128x128 tile that is not fully masked; backward counts 2.5 times the forward pass). For a quick look while
changing kernels: the figures that are published come from benchmarks/kernels.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda.timing import median_ms, random_inputs
from benchmarks.workloads import MASKS, Case
from paddle_flashmask import _core

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))
from device_tensors import Call

Times = tuple[float, float]


def ours(library: _core.Library, case: Case, inputs: list[Any], seconds: float = 0.3, **options: Any) -> Times:
    """Forward and backward ms; `options` go to the call (deterministic, dropout, ...)."""
    q, k, v, dout = inputs
    indices, causal = case.indices()
    bounds = None if indices is None else torch.from_numpy(np.ascontiguousarray(indices)).cuda()
    call = Call(q, k, v, bounds, causal=causal, library=library, **options)
    call.set_gradient(dout)
    return median_ms(call.forward, seconds), median_ms(call.backward, seconds)


def flash_attention_2(case: Case, inputs: list[Any], seconds: float = 0.3) -> Times:
    """PyTorch's FLASH_ATTENTION backend, for the masks `causal` and `full`."""
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs[:3])
    gradient = inputs[3].transpose(1, 2)
    causal = case.mask == "causal"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), seconds)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    backward = median_ms(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), seconds)
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", required=True, help="libflashmask.so; may be given repeatedly")
    parser.add_argument("--masks", default="causal,full", help="comma-separated, or 'all'")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32768, help="batch * seqlen; heads * head_dim is 4096")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each figure")
    args = parser.parse_args()
    libraries = {path: _core.load_library(path) for path in args.library}
    print(torch.cuda.get_device_name())
    for head_dim in map(int, args.head_dims.split(",")):
        batch, heads = max(1, args.tokens // args.seqlen), 4096 // head_dim
        inputs = random_inputs(batch, args.seqlen, heads, head_dim)
        for mask in MASKS if args.masks == "all" else args.masks.split(","):
            case = Case(mask, args.seqlen, head_dim, heads, batch, "bfloat16")
            gigaflops = case.forward_flops() * case.area()[1] / 1e9
            times = {}
            if mask in ("causal", "full"):
                times["flash-attention-2"] = flash_attention_2(case, inputs, args.seconds)
            for path, library in libraries.items():
                times[path] = ours(library, case, inputs, args.seconds)
            for name, (forward, backward) in times.items():
                print(
                    f"d={head_dim} {mask:22s} {name:40s} forward {forward:8.3f} ms {gigaflops / forward:4.0f} TFLOPs/s"
                    f"   backward {backward:8.3f} ms {2.5 * gigaflops / backward:4.0f} TFLOPs/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
