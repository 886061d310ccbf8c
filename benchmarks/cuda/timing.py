"""Times of CUDA calls by events, and the attention calls to time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def alternating_medians_ms(
    calls: Sequence[Callable[[], Any]], seconds: float = 0.3, at_least: int = 5, at_most: int = 200
) -> list[float]:
    """Median time of each call in ms: one after the other in every round, the order reversed in every second round.

    Clocks and temperature drift by some percent within a second, so what is compared has to run side by side. The
    rounds take about `seconds` for each call, after a warm-up.
    """

    def record(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    for call in calls:
        call()
    trial = [record(call) for call in calls]
    torch.cuda.synchronize()
    slowest = max(start.elapsed_time(end) for start, end in trial)
    rounds = max(at_least, min(at_most, int(seconds * 1e3 / max(slowest, 1e-3))))
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for number in range(rounds):
        for place in range(len(calls))[:: -1 if number % 2 else 1]:
            times[place].append(record(calls[place]))
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in times]


def random_inputs(batch: int, seqlen: int, heads: int, head_dim: int, heads_k: int | None = None) -> list[Any]:
    """q, k, v, dout: bfloat16 [batch, seqlen, heads, head_dim] on the device."""
    torch.manual_seed(0)
    each = (heads, heads_k or heads, heads_k or heads, heads)
    return [torch.randn(batch, seqlen, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in each]
