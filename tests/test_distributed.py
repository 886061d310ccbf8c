"""paddle_flashmask.distributed: by itself, and on several workers, which are processes on this machine (Gloo)."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from reference import FORMS, random_intervals

from paddle_flashmask import flashmask_attention, masks
from paddle_flashmask.distributed import context_parallel_attention, gather_sequence, split_sequence
from paddle_flashmask.distributed.attention import row_intervals

TESTS = Path(__file__).resolve().parent
CHECKS = ("parts", "forms", "masks_of_training", "window", "recompute", "frozen", "groups", "training")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(workers: int, command: list[Any], folder: Path) -> list[str]:
    """What each worker wrote; fails where one fails, with what that one wrote last."""
    master, *ports = free_ports(workers + 1)
    ends = [f"127.0.0.1:{port}" for port in ports]
    processes, logs = [], [folder / f"worker-{rank}.txt" for rank in range(workers)]
    for rank, log in enumerate(logs):
        environment = {
            **os.environ,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(workers),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
            "PADDLE_CURRENT_ENDPOINT": ends[rank],
            "PADDLE_MASTER": f"127.0.0.1:{master}",
            "PADDLE_DISTRI_BACKEND": "gloo",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("w") as output:
            processes.append(
                subprocess.Popen([sys.executable, *command], env=environment, cwd=TESTS, stdout=output, stderr=output)
            )
    try:
        statuses = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()  # the others wait for one that has failed
    texts = [log.read_text() for log in logs]
    failed = [f"worker {rank}:\n{text[-2000:]}" for rank, text in enumerate(texts) if statuses[rank] != 0]
    assert not failed, "\n".join(failed)
    return texts


@pytest.mark.parametrize("workers", [2, 4])
def test_on_workers(workers: int, tmp_path: Path) -> None:
    """Every check of distributed_worker.py."""
    for text in run_workers(workers, ["distributed_worker.py", *CHECKS], tmp_path):
        assert [line for line in text.splitlines() if line.startswith("passed")] == [f"passed: {c}" for c in CHECKS]


def test_the_example_of_the_documents(tmp_path: Path) -> None:
    """It says the same on every worker, and the same loss as alone."""
    document = (TESTS.parent / "docs" / "context-parallel.md").read_text()
    (code,) = re.findall(r"```python\n# example.py\n(.*?)```", document, re.DOTALL)
    example = tmp_path / "example.py"
    example.write_text(code.replace("64 * dist.get_world_size()", "128"))
    said = {line for text in run_workers(2, [example], tmp_path) for line in text.splitlines() if "loss" in line}
    example.write_text(example.read_text().replace("dist.all_reduce(", "type("))  # there is no group to do it
    (alone,) = (line for line in run_workers(1, [example], tmp_path)[0].splitlines() if "loss" in line)
    (together,) = said
    assert together.split()[2:] == alone.split()[2:] == ["logits", "[1,", "128,", "100]"]
    assert float(together.split()[1]) == pytest.approx(float(alone.split()[1]), rel=1e-6)


@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), *FORMS])
def test_row_intervals_mask_the_same(n: int, causal: bool) -> None:
    """Of the whole sequence, and of each chunk when its first row is subtracted."""
    rng = np.random.default_rng(n)
    seqlen, length = 60, 15
    indices = random_intervals(rng, 2, 2, seqlen, seqlen, n) if n else None
    expected = masks.to_dense(indices, causal, seqlen, seqlen)
    intervals = row_intervals(None if indices is None else paddle.to_tensor(indices), causal, 2, seqlen)
    if intervals is None:
        assert not n
        assert not causal
        return
    assert intervals.shape == [2, 2 if n else 1, seqlen, 4]
    for first in range(0, seqlen, length):
        found = masks.to_dense((intervals - first).numpy(), False, length, seqlen)
        np.testing.assert_array_equal(found, np.broadcast_to(expected[:, :, first : first + length], found.shape))


def operands(seqlen: int = 8, dtype: str = "float32") -> list[Any]:
    return [paddle.ones([1, seqlen, heads, 16], dtype) for heads in (2, 1, 1)]


def test_alone() -> None:
    """One worker needs no parallel environment."""
    paddle.seed(3)
    query, key, value = (paddle.randn([1, 64, heads, 16]) for heads in (4, 2, 2))
    bounds = paddle.to_tensor(masks.causal_document([[20, 44]])[0])
    out, lse = context_parallel_attention(query, key, value, bounds, causal=True, return_softmax_lse=True)
    expected, expected_lse = flashmask_attention(query, key, value, bounds, causal=True, return_softmax_lse=True)
    np.testing.assert_array_equal(out.numpy(), expected.numpy())
    np.testing.assert_array_equal(lse.numpy(), expected_lse.numpy())
    np.testing.assert_array_equal(split_sequence(query).numpy(), query.numpy())
    np.testing.assert_array_equal(gather_sequence(query).numpy(), query.numpy())


REFUSED = {
    "odd": (lambda: context_parallel_attention(*operands(7)), ValueError, r"query.shape\[1\], .* even .* got 7 and 7"),
    "unequal": (
        lambda: context_parallel_attention(operands(8)[0], *operands(6)[1:]),
        ValueError,
        r"expected the same even number of tokens.*, got 8 and 6",
    ),
    "part_of_the_mask": (
        lambda: context_parallel_attention(*operands(), paddle.zeros([1, 1, 4, 1], "int32"), causal=True),
        ValueError,
        r"startend_row_indices.shape\[2\]",
    ),
    "both": (
        lambda: context_parallel_attention(
            *operands(), paddle.zeros([1, 1, 8, 1], "int32"), causal=True, window_size=3
        ),
        ValueError,
        "window_size",
    ),
    "group": (
        lambda: context_parallel_attention(*operands(), group=[0, 1]),
        TypeError,
        "group: expected a group made by",
    ),
    "causal": (lambda: context_parallel_attention(*operands(), causal=1), TypeError, "causal: expected a bool"),
    "query": (lambda: context_parallel_attention(None, *operands()[1:]), TypeError, "query: expected a paddle.Tensor"),
    "float64": (lambda: context_parallel_attention(*operands(dtype="float64")), TypeError, "query.dtype: expected"),
    "split_odd": (
        lambda: split_sequence(paddle.zeros([2, 7])),
        ValueError,
        r"whole.shape\[1\]: .* multiple of 2, .* got 7",
    ),
    "split_axis": (
        lambda: split_sequence(paddle.zeros([2, 8]), axis=2),
        ValueError,
        "axis: .* of whole, which has 2, got 2",
    ),
    "split_type": (lambda: split_sequence(np.zeros((2, 8))), TypeError, "whole: expected a paddle.Tensor"),
    "gather_odd": (
        lambda: gather_sequence(paddle.zeros([2, 7])),
        ValueError,
        r"part.shape\[1\]: expected an even length",
    ),
    "gather_axis": (lambda: gather_sequence(paddle.zeros([2, 8]), axis=True), TypeError, "axis: expected an integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_static_programs_are_refused() -> None:
    paddle.enable_static()
    try:
        with pytest.raises(RuntimeError, match="expected dynamic mode"):
            context_parallel_attention(None, None, None)
    finally:
        paddle.disable_static()
