"""One worker of tests/test_distributed.py: runs the checks named on its command line, each on all workers at once.

What a worker has to compute it computes alone, too, on the whole sequence: the inputs are the same on all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed.fleet.utils import recompute
from reference import FORMS, random_intervals
from test_functional_amp import amp_state

from paddle_flashmask import flashmask_attention, masks
from paddle_flashmask.distributed import context_parallel_attention, gather_sequence, shards, split_sequence

NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(
    rng: np.random.Generator, seqlen: int, dtype: str = "float32", dims: tuple[int, int] = (32, 32), batch: int = 2
) -> list[Any]:
    """query, key, value and the gradient of the output: 4 heads, 2 key heads."""
    shapes = [(4, dims[0]), (2, dims[0]), (2, dims[1]), (4, dims[1])]
    arrays = [rng.standard_normal((batch, seqlen, heads, dim)).astype(np.float32) for heads, dim in shapes]
    return [paddle.to_tensor(array).astype(dtype) for array in arrays]


def results(attention: Callable[..., Any], tensors: list[Any], *arguments: Any, **options: Any) -> list[Any]:
    *operands, gradient = tensors
    for operand in operands:
        operand.stop_gradient = False
    out, lse = attention(*operands, *arguments, return_softmax_lse=True, **options)
    out.backward(gradient)  # paddle.grad and recompute do not go together
    return [out, lse, *(operand.grad for operand in operands)]


def compare(tensors: list[Any], *arguments: Any, group: Any = None, layer: Any = None, **options: Any) -> None:
    """One worker alone and all of them: the same bits of what belongs to rows, the same sums for keys but rounding."""
    whole = results(flashmask_attention, [tensor.detach() for tensor in tensors], *arguments, **options)
    attention = layer or (lambda *all, **named: context_parallel_attention(*all, **named, group=group))
    parts = results(attention, [split_sequence(tensor, group=group) for tensor in tensors], *arguments, **options)
    for name, part, expected in zip(NAMES, parts, whole, strict=True):
        assert part.dtype == expected.dtype, name
        got = gather_sequence(part, axis=2 if name == "lse" else 1, group=group)
        got, expected = (tensor.astype("float32").numpy() for tensor in (got, expected))
        if name in ("dk", "dv"):
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert error < (1e-6 if tensors[0].dtype == paddle.float32 else 0.005), (name, error)
        else:
            np.testing.assert_array_equal(got, expected, err_msg=name)


def check_forms() -> None:
    rng = np.random.default_rng(0)
    seqlen = 2 * 37 * dist.get_world_size()  # chunks of an odd length, of no whole tile
    for number, (n, causal) in enumerate([(0, False), (0, True), *FORMS]):
        for heads in (1, 2, 4):
            bounds = None
            if n:
                bounds = random_intervals(rng, 2, heads, seqlen, seqlen, n)
                bounds[:, :, ::7] = rng.choice(
                    np.array([-(2**31), 2**31 - 1, 0, seqlen], np.int32), bounds[:, :, ::7].shape
                )
                bounds = paddle.to_tensor(bounds)
            dims = (32, 64) if number % 2 else (64, 32)
            compare(inputs(rng, seqlen, dims=dims), bounds, causal=causal, softmax_scale=0.2)


def check_masks_of_training() -> None:
    rng = np.random.default_rng(1)
    seqlen = 128 * dist.get_world_size()
    third = seqlen // 3
    for mask in (
        masks.causal_document([[third, third, third], [seqlen - 5]], seqlen=seqlen),
        masks.share_question([[[third, third // 2, third // 2]], [[5, third]]], seqlen=seqlen),
        masks.sliding_window([seqlen, seqlen], 50),
    ):
        for dtype in ("float32", "bfloat16"):
            compare(inputs(rng, seqlen, dtype), paddle.to_tensor(mask[0]), causal=mask[1], deterministic=True)


def check_window() -> None:
    rng = np.random.default_rng(2)
    tensors = inputs(rng, 96 * dist.get_world_size())
    for window, causal in ((20, True), ((30, 10), False), ((-1, 4), False), (-1, True)):
        compare(tensors, window_size=window, causal=causal)


def check_recompute() -> None:
    rng = np.random.default_rng(3)

    def layer(*operands: Any, **options: Any) -> Any:
        return recompute(lambda *tensors: context_parallel_attention(*tensors, **options), *operands)

    compare(inputs(rng, 64 * dist.get_world_size()), causal=True, layer=layer)


def check_frozen() -> None:
    """Operands without a gradient, as in the first layer under LoRA, and none with one, as in evaluation."""
    rng = np.random.default_rng(6)
    *operands, gradient = inputs(rng, 32 * dist.get_world_size())
    parts = [split_sequence(operand) for operand in operands]
    for trained in ((), (0,), (1,), (2,), (0, 2), (1, 2)):
        whole_gradients, gradients = [], []
        for attention, tensors, found in (
            (flashmask_attention, operands, whole_gradients),
            (context_parallel_attention, parts, gradients),
        ):
            leaves = [tensor.detach() for tensor in tensors]
            for place in trained:
                leaves[place].stop_gradient = False
            out = attention(*leaves, causal=True)
            assert out.stop_gradient is not bool(trained)
            if trained:
                out.backward(gradient if attention is flashmask_attention else split_sequence(gradient))
            found.append(out.detach())
            found += [leaves[place].grad for place in trained]
            assert all(leaf.grad is None for place, leaf in enumerate(leaves) if place not in trained)
        for part, whole in zip(gradients, whole_gradients, strict=True):
            np.testing.assert_allclose(gather_sequence(part).numpy(), whole.numpy(), rtol=1e-5, atol=1e-5)


def check_some_gradients() -> None:
    """paddle.grad for any of the operands; and what is summed over the workers is float32, whoever sums it."""
    rng = np.random.default_rng(7)
    workers, rank = dist.get_world_size(), dist.get_rank()
    *operands, gradient = (split_sequence(tensor) for tensor in inputs(rng, 32 * workers, "bfloat16"))
    all_reduce, summed = dist.all_reduce, []

    def recorded(tensor: Any, **options: Any) -> None:
        summed.append(tensor.dtype)
        all_reduce(tensor, **options)

    def reduce_scatter(own: Any, parts: Any, **options: Any) -> None:
        """As NCCL has it."""
        together = parts.reshape([workers, *own.shape])
        recorded(together, **options)
        paddle.assign(together[rank], own)

    for wanted in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2]):
        found = []
        for backend in ("GLOO", "NCCL"):
            for operand in operands:
                operand.stop_gradient = False
            with (
                mock.patch.multiple(dist, all_reduce=recorded, get_backend=lambda group, is_=backend: is_),
                mock.patch.object(dist.stream, "reduce_scatter", reduce_scatter),
            ):
                out = context_parallel_attention(*operands, causal=True)
                found.append(paddle.grad(out, [operands[place] for place in wanted], grad_outputs=[gradient]))
        for gloo, nccl in zip(*found, strict=True):
            assert gloo.dtype == nccl.dtype == paddle.bfloat16
            np.testing.assert_array_equal(gloo.astype("float32").numpy(), nccl.astype("float32").numpy())
    assert set(summed) == {paddle.float32}


def check_rounding() -> None:
    """The shares of dK and dV are rounded before they are added, and nothing else is. (1.3 to 1.4 times, measured; 1.8
    if a worker's own two shares were added in bfloat16.)"""
    if float(paddle.to_tensor(1 + 0.75 * 2**-7).astype("bfloat16")) == 1.0:
        return  # Paddle 2.6 truncates on CPUs: the sum's own error is twice a rounded one's
    rng = np.random.default_rng(9)
    for batch in (1, 2):
        for causal in (False, True):
            tensors = inputs(rng, 256 * dist.get_world_size(), "bfloat16", batch=batch)
            exact = results(flashmask_attention, [tensor.astype("float32") for tensor in tensors], causal=causal)
            alone = results(flashmask_attention, [tensor.detach() for tensor in tensors], causal=causal)
            parts = results(context_parallel_attention, [split_sequence(tensor) for tensor in tensors], causal=causal)
            for want, one, part in zip(exact[3:], alone[3:], parts[3:], strict=True):
                errors = [
                    np.linalg.norm(tensor.astype("float32").numpy() - want.numpy())
                    for tensor in (one, gather_sequence(part))
                ]
                assert errors[1] < 1.6 * errors[0], (batch, causal, errors)


def check_what_is_passed_on() -> None:
    """To the op and to the collectives: options, the group that was named, blocks of memory."""
    group, calls = dist.get_group(), []

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*tensors: Any, **options: Any) -> Any:
            calls.append(function.__name__)
            assert options["group"] is group
            assert all(tensor.is_contiguous() for tensor in tensors)
            return function(*tensors, **options)

        return called

    def attention(*operands: Any, **options: Any) -> Any:
        calls.append("attention")
        assert options["deterministic"] is True
        assert options["softmax_scale"] == 0.25
        return flashmask_attention(*operands, **options)

    packed = paddle.randn([1, 32, 2, 96])
    packed.stop_gradient = False
    query, key, value = (packed[..., begin : begin + 32] for begin in (0, 32, 64))
    with (
        mock.patch.object(dist.stream, "all_gather", seen(dist.stream.all_gather)),
        mock.patch.object(dist, "all_reduce", seen(dist.all_reduce)),
        mock.patch("paddle_flashmask.distributed.attention.flashmask_attention", attention),
    ):
        out = context_parallel_attention(query, key, value, softmax_scale=0.25, deterministic=True, group=group)
        out.sum().backward()
    assert calls == ["all_gather"] * 2 + ["attention"] * 2 + ["all_reduce"] * 2
    assert packed.grad.shape == packed.shape


def check_amp() -> None:
    """auto_cast casts the operands, and nothing else on the way."""
    tensors = inputs(np.random.default_rng(8), 32 * dist.get_world_size())
    *parts, gradient = (split_sequence(tensor) for tensor in tensors)
    for part in parts:
        part.stop_gradient = False
    with amp_state("bfloat16", level="O2"):
        assert split_sequence(tensors[0]).dtype == gather_sequence(parts[0]).dtype == paddle.float32
        out, lse = context_parallel_attention(*parts, causal=True, return_softmax_lse=True)
        assert (out.dtype, lse.dtype) == (paddle.bfloat16, paddle.float32)
        out.backward(gradient.astype("bfloat16"))
    assert {part.grad.dtype for part in parts} == {paddle.float32}
    whole = flashmask_attention(*(tensor.astype("bfloat16") for tensor in tensors[:3]), causal=True)
    np.testing.assert_array_equal(gather_sequence(out).astype("float32").numpy(), whole.astype("float32").numpy())


def check_groups() -> None:
    """A group that is named, and one that this worker is not in.

    Not with groups that are made here: Gloo's of Paddle 3.3 look up each other's addresses under the same keys, so that
    in one of three runs a worker of the second waits for one of the first.
    """
    compare(inputs(np.random.default_rng(4), 32 * dist.get_world_size()), causal=True, group=dist.get_group())
    rank = dist.get_rank()
    others = [other for other in range(dist.get_world_size()) if other != rank]
    with pytest.raises(ValueError, match=rf"^group: expected one that this process, of rank {rank}, is in, got \["):
        split_sequence(paddle.zeros([1, 8]), group=dist.communication.group.Group(-1, 7, others))


def check_parts() -> None:
    """Which tokens a worker has, and that they find their way back."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    whole = paddle.arange(2 * 6 * workers).reshape([2, 6 * workers])
    part = split_sequence(whole)
    late = 2 * workers - 1 - rank
    places = [*range(3 * rank, 3 * rank + 3), *range(3 * late, 3 * late + 3)]
    np.testing.assert_array_equal(part.numpy(), whole.numpy()[:, places])
    np.testing.assert_array_equal(gather_sequence(part).numpy(), whole.numpy())
    turned = split_sequence(whole.t(), axis=0)
    np.testing.assert_array_equal(gather_sequence(turned, axis=-2).numpy(), whole.t().numpy())
    for dtype in shards.DTYPES:
        assert (
            gather_sequence(split_sequence(whole.astype(dtype))).astype("int64").sum()
            == whole.astype(dtype).astype("int64").sum()
        )
    hidden = whole.astype("bfloat16") + 1  # nowhere zero
    hidden.stop_gradient = False
    part = split_sequence(hidden)
    (part * part).sum().backward()
    expected = np.zeros(whole.shape, np.float32)
    expected[:, places] = 2 * (whole.numpy()[:, places] + 1)
    np.testing.assert_array_equal(hidden.grad.astype("float32").numpy(), expected)
    for uneven in ([1, 2 * (rank + 1)], [1] * rank + [1, 2]):
        with pytest.raises(ValueError, match=r"^part: expected the same shape on every worker, got "):
            gather_sequence(paddle.zeros(uneven), axis=-1)
    with pytest.raises(TypeError, match=r"^part.dtype: expected the same on every worker, got \['float"):
        gather_sequence(paddle.zeros([1, 2], "float64" if rank else "float32"))


class Model(paddle.nn.Layer):
    """Two layers of attention between an embedding and a linear layer."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        super().__init__()
        self.attention = attention
        self.embedding = paddle.nn.Embedding(50, 64)
        self.projections = paddle.nn.LayerList([paddle.nn.Linear(64, 192) for _ in range(2)])
        self.head = paddle.nn.Linear(64, 50)

    def forward(self, ids: Any, bounds: Any) -> Any:
        hidden = self.embedding(ids)
        for projection in self.projections:
            query, key, value = paddle.split(projection(hidden).reshape([*ids.shape, 2, 96]), 3, axis=-1)
            hidden = hidden + self.attention(query, key, value, bounds, causal=True).flatten(2)
        return self.head(hidden)


def check_training() -> None:
    """Losses of some steps of a model equal those of one worker; gradients of weights are summed."""
    seqlen = 60 * dist.get_world_size()
    ids = np.random.default_rng(5).integers(0, 50, (1, seqlen + 1))
    bounds = paddle.to_tensor(masks.causal_document([[seqlen // 3, seqlen - seqlen // 3]])[0])
    losses: dict[bool, list[float]] = {}
    for alone in (True, False):
        paddle.seed(1)
        model = Model(flashmask_attention if alone else context_parallel_attention)
        optimizer = paddle.optimizer.AdamW(0.01, parameters=model.parameters())
        tokens, labels = (paddle.to_tensor(ids[:, begin : begin + seqlen]) for begin in (0, 1))
        if not alone:
            tokens, labels = split_sequence(tokens), split_sequence(labels)
        losses[alone] = []
        for _ in range(5):
            loss = paddle.nn.functional.cross_entropy(model(tokens, bounds), labels, reduction="sum") / seqlen
            loss.backward()
            if not alone:
                for weight in model.parameters():
                    dist.all_reduce(weight.grad)
                dist.all_reduce(loss)
            optimizer.step()
            optimizer.clear_grad()
            losses[alone].append(float(loss))
    assert losses[True][0] > losses[True][-1]
    np.testing.assert_allclose(losses[False], losses[True], rtol=1e-5)


def main() -> None:
    paddle.set_device("cpu")
    dist.init_parallel_env()
    for name in sys.argv[1:]:
        globals()[f"check_{name}"]()
        print(f"passed: {name}", flush=True)


if __name__ == "__main__":
    main()
