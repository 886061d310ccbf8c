"""Watching the routed attention calls, for checks and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import paddle

__all__ = ["RoutedCall", "report_call", "watching"]


@dataclass(frozen=True)
class RoutedCall:
    """One attention call with row indices, as the model made it.

    Attributes:
        query: ``[b, s_q, heads_q, d]``.
        key: ``[b, s_k, heads_k, d]``.
        value: ``[b, s_k, heads_k, d_v]``.
        row_indices: what the model handed over, in PaddleNLP's form.
        out: ``[b, s_q, heads_q, d_v]``.
    """

    query: paddle.Tensor
    key: paddle.Tensor
    value: paddle.Tensor
    row_indices: paddle.Tensor
    out: paddle.Tensor


_watchers: list[Callable[[RoutedCall], None]] = []


def report_call(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, row_indices: paddle.Tensor, out: paddle.Tensor
) -> None:
    """Tell the watchers of a routed call."""
    for watcher in tuple(_watchers):
        watcher(RoutedCall(query, key, value, row_indices, out))


@contextlib.contextmanager
def watching(watcher: Callable[[RoutedCall], None]) -> Iterator[None]:
    """Call ``watcher`` after each routed attention call inside the ``with`` block."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
