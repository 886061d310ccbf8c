"""Which tokens a worker has, and tensors on the way between a worker's part and the whole sequence.

A sequence is cut into 2 * workers chunks of equal length; worker r has chunks r and 2 * workers - 1 - r, in that order.
So under a causal mask all have the same work: what the early chunk sees less, the late one sees more. (Llama 3's
training and Megatron-LM's context parallelism share the work like this, too.)
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import paddle
import paddle.distributed as dist

from .. import _checks

# What paddle.concat and all_gather both take, on CPUs too.
DTYPES = ("bool", "int8", "uint8", "int32", "int64", "bfloat16", "float16", "float32", "float64")


class Worker(NamedTuple):
    """A place among the workers that share a sequence."""

    rank: int
    workers: int

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of its chunks, of 2 * workers."""
        return self.rank, 2 * self.workers - 1 - self.rank


def this_worker(group: Any | None) -> Worker:
    """The calling process in `group` (None: all processes, or this one alone where no others were launched).

    Raises:
        RuntimeError: others were launched, but paddle.distributed is not set up.
        TypeError: `group` is no group of paddle.distributed.
        ValueError: the process is no member of it.
    """
    if group is None:
        if not dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{dist.get_world_size()} workers were launched; call paddle.distributed.init_parallel_env() first"
            )
        return Worker(dist.get_rank(), dist.get_world_size())
    if not isinstance(group, dist.communication.group.Group):
        raise TypeError(f"group: expected a group made by paddle.distributed.new_group, got {_checks.shown(group)}")
    if group.rank < 0:
        raise ValueError(f"group: expected one that this process, of rank {dist.get_rank()}, is in, got {group.ranks}")
    return Worker(group.rank, group.nranks)


def gathered(local: Any, worker: Worker, group: Any | None) -> Any:
    """The parts of all workers, by rank along a new first axis. All have the same shape and dtype."""
    if worker.workers == 1:
        return local.unsqueeze(0)
    # Into one buffer: asked for a list, Paddle copies the parts out of such a one.
    parts = paddle.empty([worker.workers, *local.shape], local.dtype)
    dist.stream.all_gather(parts, local.contiguous(), group=group)
    return parts


def span(tensor: Any, axis: int, begin: int, end: int) -> Any:
    """`tensor` from `begin` to `end` on one axis, without a copy. (paddle.split copies.)

    Where the axes before are of length 1 it is one block of memory. A slice is that, too, but Paddle does not know it,
    and copies it for whoever asks for one block.
    """
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    if tensor.is_contiguous() and all(length == 1 for length in before):
        return tensor.reshape([tensor.shape[axis], *after])[begin:end].reshape([*before, end - begin, *after])
    return paddle.slice(tensor, [axis], [begin], [end])


def piece(tensor: Any, axis: int, number: int, count: int) -> Any:
    """One of `count` equal pieces."""
    length = tensor.shape[axis] // count
    return span(tensor, axis, number * length, (number + 1) * length)


def entry(tensor: Any, number: int) -> Any:
    """tensor[number] of a tensor that is one block of memory, without a copy. (paddle.unbind knows no int8.)"""
    return span(tensor, 0, number, number + 1).reshape(tensor.shape[1:])


def in_order(parts: Any, axis: int) -> Any:
    """The whole sequence from `gathered` parts, whose own axis of tokens is `axis`."""
    by_rank = [entry(parts, rank) for rank in range(parts.shape[0])]
    early = [piece(part, axis, 0, 2) for part in by_rank]
    late = [piece(part, axis, 1, 2) for part in reversed(by_rank)]
    return paddle.concat(early + late, axis=axis)


def part_of(whole: Any, worker: Worker, axis: int) -> Any:
    """A worker's part of the whole sequence."""
    return paddle.concat([piece(whole, axis, chunk, 2 * worker.workers) for chunk in worker.chunks], axis=axis)


class _Part(paddle.autograd.PyLayer):
    """`part_of`. (Paddle's own gradients of split and concat know no bfloat16 on CPUs.)"""

    @staticmethod
    def forward(ctx: Any, whole: Any, worker: Worker, axis: int) -> Any:
        ctx.worker, ctx.axis = worker, axis
        return part_of(whole, worker, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        with paddle.amp.auto_cast(enable=False):
            own = {chunk: piece(gradient, ctx.axis, place, 2) for place, chunk in enumerate(ctx.worker.chunks)}
            nothing = paddle.zeros_like(own[ctx.worker.rank])
            pieces = [own.get(chunk, nothing) for chunk in range(2 * ctx.worker.workers)]
            return paddle.concat(pieces, axis=ctx.axis)


def _checked_axis(name: str, tensor: Any, axis: Any) -> int:
    _checks.tensor(name, tensor)
    if _checks.dtype_name(tensor) not in DTYPES:
        raise TypeError(f"{name}.dtype: expected one of {', '.join(DTYPES)}, got {_checks.dtype_name(tensor)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected a tensor that holds something, got shape {list(tensor.shape)}")
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"axis: expected an integer, got {_checks.shown(axis)}")
    place = operator.index(axis)
    if not -tensor.ndim <= place < tensor.ndim:
        raise ValueError(f"axis: expected an axis of {name}, which has {tensor.ndim}, got {axis}")
    return place % tensor.ndim


def split_sequence(whole: paddle.Tensor, axis: int = 1, group: Any | None = None) -> paddle.Tensor:
    """This worker's part of a tensor that all workers hold whole, such as input ids, position ids or labels.

    Labels must have been shifted before: the next token of a part's last one is on another worker. The gradient is that
    of this worker's part, and zero elsewhere.

    Args:
        whole: any shape without a zero; bool, int8, uint8, int32, int64, bfloat16, float16, float32 or float64.
        axis: its axis of tokens, whose length is a multiple of twice the number of workers.
        group: the workers, a group of paddle.distributed; None for all there are, those of other axes of parallelism
            among them.

    Returns:
        The chunks `rank` and `2 * workers - 1 - rank` of the axis, one after the other; as long as a worker's share.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: several workers were launched, but paddle.distributed is not set up.
    """
    axis = _checked_axis("whole", whole, axis)
    worker = this_worker(group)
    if whole.shape[axis] % (2 * worker.workers):
        raise ValueError(
            f"whole.shape[{axis}]: expected a multiple of {2 * worker.workers}, two chunks for each of "
            f"{worker.workers} workers, got {whole.shape[axis]}; pad the sequence"
        )
    with paddle.amp.auto_cast(enable=False):
        return _Part.apply(whole, worker, axis)


def gather_sequence(part: paddle.Tensor, axis: int = 1, group: Any | None = None) -> paddle.Tensor:
    """The whole tensor on every worker, from the parts that `split_sequence` makes. Carries no gradient.

    Args:
        part: this worker's, of a dtype that `split_sequence` takes.
        axis: its axis of tokens.
        group: the workers, a group of paddle.distributed; None for all.

    Returns:
        The parts in the order of the sequence, `workers` times as long.

    Raises:
        TypeError, ValueError: an argument is not as above, or parts differ in dtype or shape; the message names it.
            (Where not all workers call this, those that do wait.)
        RuntimeError: several workers were launched, but paddle.distributed is not set up.
    """
    axis = _checked_axis("part", part, axis)
    worker = this_worker(group)
    if part.shape[axis] % 2:
        raise ValueError(f"part.shape[{axis}]: expected an even length, two chunks, got {part.shape[axis]}")
    if worker.workers > 1:  # of unequal parts the collective would return garbage, or end the process
        kind = paddle.to_tensor([part.ndim, DTYPES.index(_checks.dtype_name(part))], place=part.place)
        kinds = gathered(kind, worker, group).tolist()
        dtypes = [DTYPES[number] for _, number in kinds]
        if len(set(dtypes)) > 1:
            raise TypeError(f"part.dtype: expected the same on every worker, got {dtypes}")
        shapes = [ndim for ndim, _ in kinds]
        if len(set(shapes)) == 1:
            shape = paddle.to_tensor(list(part.shape), place=part.place)
            shapes = gathered(shape, worker, group).tolist()
        if any(each != shapes[0] for each in shapes):
            raise ValueError(f"part: expected the same shape on every worker, got {shapes}")
    with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
        return in_order(gathered(part.detach(), worker, group), axis)
