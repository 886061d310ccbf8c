"""Attention implementations to time. Each runs in a worker process of its own: a crash costs one figure, not the run.

A rival is a class with `name`, `dtypes`, and
    supports(case) -> str | None    why it cannot run the case, or None
    prepare(case)                   inputs, mask, compilation: outside the timed region
    forward(), backward()           the timed calls; backward uses the last forward
    poison()                        overwrite outputs with NaN, so that a value not written shows
    results() -> dict               out, dq, dk, dv as float32 NumPy [batch, seqlen, heads, head_dim]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.workloads import Case

Arrays = dict[str, np.ndarray]


class Rival:
    name: str
    dtypes: tuple[str, ...] = ("float32",)
    has_backward: bool = True

    def supports(self, case: Case) -> str | None:
        return None if case.dtype in self.dtypes else f"no {case.dtype}"

    def prepare(self, case: Case) -> None:
        raise NotImplementedError

    def forward(self) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        raise NotImplementedError

    def poison(self) -> None:
        """Frameworks that allocate their outputs anew have nothing to overwrite."""

    def results(self) -> Arrays:
        raise NotImplementedError

    def versions(self) -> dict[str, Any]:
        return {}


def load(device: str, name: str) -> Rival:
    """The rival called `name`; ImportError where what it needs is not installed."""
    if device == "cpu":
        from benchmarks.rivals import cpu

        return cpu.RIVALS[name]()
    raise ValueError(f"device: no rivals for {device!r}")


def names(device: str) -> list[str]:
    if device == "cpu":
        from benchmarks.rivals import cpu

        return list(cpu.RIVALS)
    raise ValueError(f"device: no rivals for {device!r}")
