"""Which tokens a worker has, and tensors on the way between a worker's part and the whole sequence.

A sequence is cut into 2 * workers chunks of equal length; worker r has chunks r and 2 * workers - 1 - r, in that order.
So under a causal mask all have the same work: what the early chunk sees less, the late one sees more. (Llama 3's
training and Megatron-LM's context parallelism share the work like this, too.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import paddle
import paddle.distributed as dist

from .. import _checks


class Worker(NamedTuple):
    """A place among the workers that share a sequence."""

    rank: int
    workers: int

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of its chunks, of 2 * workers."""
        return self.rank, 2 * self.workers - 1 - self.rank


def this_worker(group: Any | None) -> Worker:
    """The calling process in `group` (None: all processes, or this one alone if there is no parallel environment).

    Raises:
        TypeError: `group` is no group of paddle.distributed.
        ValueError: the process is no member of it.
    """
    if group is None:
        return Worker(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Worker(0, 1)
    if not isinstance(group, dist.communication.group.Group):
        raise TypeError(f"group: expected a group made by paddle.distributed.new_group, got {_checks.shown(group)}")
    if not group.is_member():
        raise ValueError(f"group: expected one that this process, of rank {dist.get_rank()}, is in, got {group.ranks}")
    return Worker(group.rank, group.nranks)


def gathered(local: Any, worker: Worker, group: Any | None) -> list[Any]:
    """The parts of all workers, by rank. All have the same shape and dtype."""
    if worker.workers == 1:
        return [local]
    parts: list[Any] = []
    dist.all_gather(parts, local.contiguous(), group=group)
    return parts


def in_order(parts: Sequence[Any], axis: int) -> Any:
    """The whole sequence from the parts of all workers, by rank."""
    halves = [paddle.split(part, 2, axis=axis) for part in parts]
    return paddle.concat([early for early, _ in halves] + [late for _, late in reversed(halves)], axis=axis)


def part_of(whole: Any, worker: Worker, axis: int) -> Any:
    """A worker's part of the whole sequence."""
    pieces = paddle.split(whole, 2 * worker.workers, axis=axis)
    return paddle.concat([pieces[chunk] for chunk in worker.chunks], axis=axis)


def _checked_axis(name: str, tensor: Any, axis: Any) -> int:
    _checks.tensor(name, tensor)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis: expected an integer, got {_checks.shown(axis)}")
    if not -tensor.ndim <= axis < tensor.ndim:
        raise ValueError(f"axis: expected an axis of {name}, which has {tensor.ndim}, got {axis}")
    return axis % tensor.ndim


def split_sequence(whole: paddle.Tensor, axis: int = 1, group: Any | None = None) -> paddle.Tensor:
    """This worker's part of a tensor that all workers hold whole, such as input ids, position ids or labels.

    Labels must have been shifted before: the next token of a part's last one is on another worker.

    Args:
        whole: any shape and dtype.
        axis: its axis of tokens, whose length is a multiple of twice the number of workers.
        group: the workers, a group of paddle.distributed; None for all.

    Returns:
        The chunks `rank` and `2 * workers - 1 - rank` of the axis, one after the other; as long as a worker's share.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    axis = _checked_axis("whole", whole, axis)
    worker = this_worker(group)
    if whole.shape[axis] % (2 * worker.workers):
        raise ValueError(
            f"whole.shape[{axis}]: expected a multiple of {2 * worker.workers}, two chunks for each of "
            f"{worker.workers} workers, got {whole.shape[axis]}; pad the sequence"
        )
    return part_of(whole, worker, axis)


def gather_sequence(part: paddle.Tensor, axis: int = 1, group: Any | None = None) -> paddle.Tensor:
    """The whole tensor on every worker, from the parts that `split_sequence` makes. Carries no gradient.

    Args:
        part: this worker's; all have the same shape and dtype.
        axis: its axis of tokens.
        group: the workers, a group of paddle.distributed; None for all.

    Returns:
        The parts in the order of the sequence, `workers` times as long.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    axis = _checked_axis("part", part, axis)
    worker = this_worker(group)
    if part.shape[axis] % 2:
        raise ValueError(f"part.shape[{axis}]: expected an even length, two chunks, got {part.shape[axis]}")
    with paddle.no_grad():
        return in_order(gathered(part.detach(), worker, group), axis)
