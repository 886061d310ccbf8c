"""Timing of one rival on one case, and how far its results are from a reference's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rivals import Rival
from benchmarks.workloads import Case

# Enough to compare rivals, few enough to send between processes.
SAMPLED_VALUES = 4096


def _host_ms(call: Callable[[], None], poison: Callable[[], None], seconds: float) -> tuple[float, int]:
    """Median time of a call and how often it ran; the first run warms up, unless it alone spends the time."""
    poison()
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > seconds:
        return first * 1e3, 1
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        poison()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3, len(times)


def _device_ms(call: Callable[[], None], poison: Callable[[], None], seconds: float) -> tuple[float, int]:
    """The same by CUDA events, one pair a call; nothing waits for the host between the calls."""
    import torch

    def timed(runs: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    poison()
    timed(2)  # warms up
    once = timed(1)[0]
    times = timed(max(5, min(100, int(seconds * 1e3 / max(once, 1e-3)))))
    return statistics.median(times), len(times)


def sample(results: dict[str, Any]) -> dict[str, list[float]]:
    """The same few values of each result, wherever it was computed."""
    picks = np.random.default_rng(7)
    sampled = {}
    for name, array in results.items():
        chosen = np.unravel_index(picks.integers(0, math.prod(array.shape), SAMPLED_VALUES), tuple(array.shape))
        values = array[chosen]
        sampled[name] = (
            (values if isinstance(values, np.ndarray) else values.float().cpu().numpy()).astype(float).tolist()
        )
    return sampled


def largest_difference(mine: dict[str, list[float]], reference: dict[str, list[float]]) -> float:
    """Largest ||a - b|| / ||b|| over the results; NaN if a value is NaN."""
    worst = 0.0
    for name, values in mine.items():
        a, b = np.asarray(values), np.asarray(reference[name])
        worst = float(np.maximum(worst, np.linalg.norm(a - b) / np.linalg.norm(b)))  # NaN wins in np.maximum
    return worst


def measure(rival: Rival, case: Case, seconds: float) -> dict[str, Any]:
    """Times in ms, and sampled results. `seconds` is spent on each direction, three runs at least where they fit."""
    rival.prepare(case)
    median_ms = _device_ms if rival.on_cuda else _host_ms
    fwd_ms, fwd_runs = median_ms(rival.forward, rival.poison, seconds)
    bwd_ms, bwd_runs = median_ms(rival.backward, lambda: None, seconds) if rival.has_backward else (None, 0)
    answer: dict[str, Any] = {
        "fwd_ms": round(fwd_ms, 3),
        "bwd_ms": None if bwd_ms is None else round(bwd_ms, 3),
        "runs": [fwd_runs, bwd_runs],
        "versions": rival.versions(),
        "sample": sample(rival.results()),
    }
    if kernels := rival.kernels():
        answer["kernels"] = kernels
    if rival.on_cuda:
        answer["peak_mib"] = _extra_memory_mib(rival)
    return answer


def _extra_memory_mib(rival: Rival) -> float:
    """Device memory at the peak of one forward and backward, over what is allocated before: inputs and mask."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rival.forward()
    rival.backward()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
