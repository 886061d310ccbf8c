"""Timing of one rival on one case, and how far its results are from a reference's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rivals import Rival
from benchmarks.workloads import Case

# Enough to compare rivals, few enough to send between processes.
SAMPLED_VALUES = 4096


def _median_ms(call: Callable[[], None], poison: Callable[[], None], seconds: float) -> tuple[float, int]:
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


def sample(results: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The same few values of each result, wherever it was computed."""
    picks = np.random.default_rng(7)
    return {
        name: array.ravel()[picks.integers(0, array.size, SAMPLED_VALUES)].astype(float).tolist()
        for name, array in results.items()
    }


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
    fwd_ms, fwd_runs = _median_ms(rival.forward, rival.poison, seconds)
    bwd_ms, bwd_runs = _median_ms(rival.backward, lambda: None, seconds) if rival.has_backward else (None, 0)
    return {
        "fwd_ms": round(fwd_ms, 3),
        "bwd_ms": None if bwd_ms is None else round(bwd_ms, 3),
        "runs": [fwd_runs, bwd_runs],
        "versions": rival.versions(),
        "sample": sample(rival.results()),
    }
