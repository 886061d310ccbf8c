"""Times of CUDA calls by events, and the attention calls to time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median_ms(call: Callable[[], Any], seconds: float = 0.3, at_least: int = 5) -> float:
    """Median time of a call in ms by CUDA events, after a warm-up; runs for about `seconds`."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    runs = max(at_least, min(100, int(seconds * 1e3 / max(start.elapsed_time(end), 1e-3))))
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def random_inputs(batch: int, seqlen: int, heads: int, head_dim: int, heads_k: int | None = None) -> list[Any]:
    """q, k, v, dout: bfloat16 [batch, seqlen, heads, head_dim] on the device."""
    torch.manual_seed(0)
    each = (heads, heads_k or heads, heads_k or heads, heads)
    return [torch.randn(batch, seqlen, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in each]
