"""One worker of test_paddle_gpu_distributed.py: one sequence on several GPUs, by NCCL, against one GPU alone.

    python distributed_gpu_worker.py RESULTS

Writes to RESULTS, a JSON file, how far the workers' results are from those of one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import carrier
import numpy as np
import paddle
import paddle.distributed as dist
from attention_case import NAMES, STORE, loaded

from paddle_flashmask import flashmask_attention, masks
from paddle_flashmask.distributed import context_parallel_attention, gather_sequence, split_sequence

HEADS_Q, HEADS_K, HEAD_DIM = 8, 2, 128
# On a CPU only the packing and this file are tried.
SEQLEN, REPEATS, DTYPES = (2048, 10, ("bfloat16", "float16")) if carrier.ON_GPU else (256, 1, ("bfloat16", "float32"))


def paddle_has_kernels() -> bool:
    """Whether Paddle's own kernels run on this device: slim.py blanks them, and they then leave garbage."""
    return bool((paddle.full([1000], 3.0).numpy() == 3.0).all())


def on_device(array: np.ndarray) -> Any:
    place = paddle.CUDAPlace(dist.ParallelEnv().device_id) if carrier.ON_GPU else paddle.CPUPlace()
    return carrier.tensor(array, at=place)


def in_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    return STORE[dtype](values.astype(np.float32)) if dtype in STORE else values.astype(dtype)


def of_arrays(function: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """A function of tensors that computes on the host, from one of arrays: its operands come and go by copies."""

    def computed(*operands: Any) -> Any:
        return on_device(function(*(each.numpy() if isinstance(each, paddle.Tensor) else each for each in operands)))

    return computed


@contextlib.contextmanager
def kernels_on_the_host() -> Iterator[None]:
    """In the place of Paddle's kernels that `paddle_flashmask.distributed` uses. Slices and empty tensors need none."""

    def joined(tensors: Sequence[Any], axis: int = 0) -> Any:
        return on_device(np.concatenate([tensor.numpy() for tensor in tensors], axis))

    def stacked(tensors: Sequence[Any]) -> Any:
        return on_device(np.stack([tensor.numpy() for tensor in tensors]))

    def clipped(tensor: Any, low: int, high: int) -> Any:
        return on_device(np.clip(tensor.numpy(), low, high))

    def cast(tensor: Any, dtype: Any) -> Any:
        name = str(dtype).rpartition(".")[2]
        array = tensor.numpy()
        values = loaded(array) if array.dtype == np.uint16 else array
        return on_device(in_storage(values, name))

    def zeros(shape: Sequence[int], dtype: str) -> Any:
        return on_device(np.zeros(shape, dtype))

    with contextlib.ExitStack() as stack:
        for name, function in {
            "concat": joined,
            "stack": stacked,
            "clip": clipped,
            "zeros": zeros,
        }.items():
            stack.enter_context(mock.patch.object(paddle, name, function))
        for name, function in {
            "astype": cast,
            "__add__": of_arrays(np.add),
            "__sub__": of_arrays(np.subtract),
        }.items():
            stack.enter_context(mock.patch.object(paddle.Tensor, name, function))
        yield


def mask_cases(seqlen: int) -> dict[str, tuple[Any, bool]]:
    lengths = [seqlen // 3, seqlen // 2]
    lengths.append(seqlen - sum(lengths))
    return {
        "causal": (None, True),
        "full": (None, False),
        "causal_document": masks.causal_document([lengths]),
        "document": masks.document([lengths]),
        "sliding_window": masks.sliding_window([seqlen], seqlen // 8),
        "share_question": masks.share_question([[[lengths[0], lengths[1], lengths[2]]]]),
    }


def results(attention: Callable[..., Any], arrays: Sequence[np.ndarray], bounds: Any, causal: bool) -> dict[str, Any]:
    """Of tensors that are made anew from the arrays."""
    *operands, gradient = (on_device(array) for array in arrays)
    for operand in operands:
        operand.stop_gradient = False
    out, lse = attention(*operands, bounds, causal=causal, return_softmax_lse=True, deterministic=True)
    out.backward(gradient)
    return dict(zip(NAMES, (out, lse, *(operand.grad for operand in operands)), strict=True))


def differences(dtype: str, seqlen: int) -> dict[str, dict[str, float]]:
    """For each mask and result the 2-norm of the difference over that of one GPU's result; 0 where all bits agree."""
    rng = np.random.default_rng(0)
    heads = (HEADS_Q, HEADS_K, HEADS_K, HEADS_Q)
    arrays = [in_storage(rng.standard_normal((1, seqlen, n, HEAD_DIM)), dtype) for n in heads]
    parts = [split_sequence(on_device(array)).numpy() for array in arrays]
    found = {}
    for name, (indices, causal) in mask_cases(seqlen).items():
        bounds = None if indices is None else on_device(indices)
        alone = {key: tensor.numpy() for key, tensor in results(flashmask_attention, arrays, bounds, causal).items()}
        found[name] = dict.fromkeys(NAMES, 0.0)
        for _ in range(REPEATS):  # what is read before it is there moves
            together = results(context_parallel_attention, parts, bounds, causal)
            for key, part in together.items():
                if key == "lse":  # to where tokens are the second axis: a part of another is no block of memory
                    part = on_device(np.ascontiguousarray(part.numpy().swapaxes(1, 2)))
                got = gather_sequence(part).numpy()
                expected = alone[key].swapaxes(1, 2) if key == "lse" else alone[key]
                assert (got.shape, got.dtype) == (expected.shape, expected.dtype), key
                got, expected = loaded(got).astype(np.float64), loaded(expected).astype(np.float64)
                assert np.isfinite(expected).all(), key
                error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
                found[name][key] = float(np.maximum(found[name][key], error))  # NaN stays
    return found


def main() -> None:
    if not carrier.ON_GPU:
        paddle.set_device("cpu")
    dist.init_parallel_env()
    has_kernels = paddle_has_kernels()
    with contextlib.nullcontext() if has_kernels else kernels_on_the_host():
        found = {dtype: differences(dtype, SEQLEN) for dtype in DTYPES}
    record = {
        "backend": dist.get_backend().lower(),
        "workers": dist.get_world_size(),
        "paddle_kernels": has_kernels,
        "differences": found,
    }
    Path(sys.argv[1]).write_text(json.dumps(record))


if __name__ == "__main__":
    main()
