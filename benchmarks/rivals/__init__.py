"""Attention implementations to time. Each runs in a worker process of its own: a crash costs one figure, not the run.

A rival is a class with `name`, `dtypes`, and
    supports(case) -> str | None    why it cannot run the case, or None
    prepare(case)                   inputs, mask, compilation: outside the timed region
    variant(case), compile(case)    for rivals that compile at their first call: so it can be done ahead, in parallel
    release()                       free what `prepare` and the calls made: the rivals of a case share a device
    forward(), backward()           the timed calls; backward uses the last forward
    poison()                        overwrite outputs with NaN, so that a value not written shows
    results() -> dict               out, dq, dk, dv [batch, seqlen, heads, head_dim]: NumPy float32, or device tensors
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from typing import Any

from benchmarks.workloads import Case

Arrays = dict[str, Any]  # NumPy arrays, or PyTorch tensors on a device


class Rival:
    name: str
    dtypes: tuple[str, ...] = ("float32",)
    has_backward: bool = True
    on_cuda: bool = False

    def supports(self, case: Case) -> str | None:
        return None if case.dtype in self.dtypes else f"no {case.dtype}"

    @staticmethod
    def variant(case: Case) -> Hashable:
        """What a case compiles: cases with equal variants share their code. None: nothing is compiled."""
        return None

    def prepare(self, case: Case) -> None:
        raise NotImplementedError

    def compile(self, case: Case) -> None:
        """Compiles the case's variant, which this object then keeps; takes little device memory."""

    def release(self) -> None:
        """What is compiled stays. Nothing to do for rivals on the host: one case fits."""

    def kernels(self) -> list[str]:
        """Which kernels run forward and backward, where a rival has several and can tell."""
        return []

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


def _rivals(device: str) -> dict[str, type[Rival]]:
    return importlib.import_module(f"benchmarks.rivals.{device}").RIVALS


def load(device: str, name: str) -> Rival:
    """The rival called `name`; ImportError where what it needs is not installed."""
    return _rivals(device)[name]()


def variant(device: str, name: str, case: Case) -> Hashable:
    """`Rival.variant`, without making the rival."""
    return _rivals(device)[name].variant(case)


def names(device: str) -> list[str]:
    return list(_rivals(device))
