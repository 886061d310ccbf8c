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


def _host_ms(call: Callable[[], None], poison: Callable[[], None], seconds: float) -> list[float]:
    """The times of the calls; the first run warms up, unless it alone spends the time."""
    poison()
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > seconds:
        return [first * 1e3]
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        poison()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return [each * 1e3 for each in times]


# A call of this length needs no second warm-up and few repeats.
LONG_MS = 50.0


def _device_ms(call: Callable[[], None], seconds: float) -> list[float]:
    """The same by CUDA events, one pair a call, after a call elsewhere; nothing waits for the host between calls."""
    import torch

    def timed(runs: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    first = timed(1)
    if first[0] > LONG_MS:  # already a measurement
        return first + timed(max(1, min(20, int(seconds * 1e3 / first[0]))))
    once = min(timed(3))
    return timed(max(5, min(100, int(seconds * 1e3 / max(once, 1e-3)))))


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
    answer = _on_device(rival, case, seconds) if rival.on_cuda else _on_host(rival, case, seconds)
    answer |= {"versions": rival.versions(), "sample": sample(rival.results())}
    if kernels := rival.kernels():
        answer["kernels"] = kernels
    return answer


def _on_host(rival: Rival, case: Case, seconds: float) -> dict[str, Any]:
    rival.prepare(case)
    forward = _host_ms(rival.forward, rival.poison, seconds)
    backward = _host_ms(rival.backward, lambda: None, seconds) if rival.has_backward else []
    return {"fwd_times": forward, "bwd_times": backward}


def _on_device(rival: Rival, case: Case, seconds: float) -> dict[str, Any]:
    """`peak_mib`: device memory at the peak of a forward and backward beyond query, key, value, output and their
    gradients: the mask, lse, workspaces."""
    import torch

    before = torch.cuda.memory_allocated()
    rival.prepare(case)
    rival.poison()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rival.forward()
    rival.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - 8 * case.operand_bytes()
    return {
        "fwd_times": _device_ms(rival.forward, seconds),
        "bwd_times": _device_ms(rival.backward, seconds),
        "peak_mib": round(extra / 2**20, 1),
    }


def combine(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of the answers of several rounds: medians over the runs of all of them, the rest from the first."""
    answer = dict(rounds[0])
    counts = []
    for direction in ("fwd", "bwd"):
        times = [each for part in rounds for each in part[f"{direction}_times"]]
        answer[f"{direction}_ms"] = round(statistics.median(times), 3) if times else None
        counts.append(len(times))
        del answer[f"{direction}_times"]
    return answer | {"runs": counts}
