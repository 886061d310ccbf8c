"""A random problem for the kernels on a CUDA device, checked against dense float64 attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dense
import numpy as np
import torch
from device_tensors import fused
from reference import random_intervals

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Problem:
    """Random inputs of one shape; the mask is random too, unless `bounds` or none is given."""

    b: int = 2
    s_q: int = 257
    s_k: int = 257
    h_q: int = 2
    h_k: int = 2
    d: int = 128
    d_v: int | None = None
    h_m: int = 1
    n: int = 0
    causal: bool = False
    dtype: str = "bf16"
    seed: int = 0
    bounds: Any = None  # int32 [b, h_m, s_k, n] in NumPy, instead of random ones
    block_mask: bool = False
    growth: float = 0.0  # of keys along the sequence: the last is so many times larger than the first
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, times: float = 2.0) -> dict[str, float]:
        """Errors in norm; `times` as in dense.check."""
        rng = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        d_v = self.d_v or self.d

        def draw(s: int, h: int, d: int) -> torch.Tensor:
            return torch.randn(self.b, s, h, d, device="cuda").to(DTYPES[self.dtype])

        q, k, v = draw(self.s_q, self.h_q, self.d), draw(self.s_k, self.h_k, self.d), draw(self.s_k, self.h_k, d_v)
        dout = draw(self.s_q, self.h_q, d_v)
        k *= 1 + self.growth * torch.linspace(0, 1, self.s_k, device="cuda", dtype=k.dtype)[:, None, None] ** 2
        bounds = self.bounds
        if bounds is None and self.n:
            bounds = random_intervals(rng, self.b, self.h_m, self.s_q, self.s_k, self.n)
        if bounds is not None:
            bounds = torch.from_numpy(np.ascontiguousarray(bounds)).cuda()
        block_mask = None
        if self.block_mask:
            shape = (self.b, self.h_m, -(-self.s_q // 128), -(-self.s_k // 128))
            block_mask = torch.from_numpy((rng.random(shape) < 0.6).astype(np.int32)).cuda()
        options = dict(self.options, causal=self.causal, block_mask=block_mask)
        got = fused(q, k, v, bounds, dout, **options)

        sees = dense.visible(bounds, self.causal, self.s_q, self.s_k, block_mask)
        scale = options.get("scale", self.d**-0.5)
        keep, factor = None, 1.0
        if options.get("dropout"):
            keep, factor = dense.keep_mask(options["dropout"], options.get("seed", 0), options.get("offset", 0), q, k)
        want = dense.attention(q, k, v, sees, scale, keep, factor, dout)
        naive = dense.attention(q, k, v, sees, scale, keep, factor, dout, dtype=DTYPES[self.dtype])
        return dense.check(got, want, naive, times)
