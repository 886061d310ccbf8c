"""paddle_flashmask.distributed: by itself, and on several workers, which are processes on this machine (Gloo)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from reference import FORMS, random_intervals
from worker_processes import run_workers

from paddle_flashmask import flashmask_attention, masks
from paddle_flashmask.distributed import context_parallel_attention, gather_sequence, split_sequence
from paddle_flashmask.distributed.attention import chunk_indices

TESTS = Path(__file__).resolve().parent
CHECKS = (
    "parts",
    "forms",
    "masks_of_training",
    "window",
    "recompute",
    "frozen",
    "some_gradients",
    "rounding",
    "what_is_passed_on",
    "amp",
    "groups",
    "training",
)


def run_gloo(workers: int, command: list[Any], folder: Path) -> list[str]:
    """What each worker wrote."""
    environment = {"PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_workers([command] * workers, folder, environment, seconds=240, cwd=TESTS)


@pytest.mark.parametrize("workers", [2, 4])
def test_on_workers(workers: int, tmp_path: Path) -> None:
    """Every check of distributed_worker.py."""
    for text in run_gloo(workers, ["distributed_worker.py", *CHECKS], tmp_path):
        assert [line for line in text.splitlines() if line.startswith("passed")] == [f"passed: {c}" for c in CHECKS]


def test_the_example_of_the_documents(tmp_path: Path) -> None:
    """It says the same on every worker, and the same loss as alone."""
    document = (TESTS.parent / "docs" / "context-parallel.md").read_text()
    (code,) = re.findall(r"```python\n# example.py\n(.*?)```", document, re.DOTALL)
    example = tmp_path / "example.py"
    example.write_text(code)
    said = {line for text in run_gloo(2, [example], tmp_path) for line in text.splitlines() if "loss" in line}
    (alone,) = (line for line in run_gloo(1, [example], tmp_path)[0].splitlines() if "loss" in line)
    (together,) = said
    assert together.split()[2:] == alone.split()[2:] == ["logits", "[1,", "1024,", "100]"]
    assert float(together.split()[1]) == pytest.approx(float(alone.split()[1]), rel=1e-6)


@pytest.mark.parametrize(("n", "causal"), FORMS)
def test_indices_of_a_chunk_mask_the_same(n: int, causal: bool) -> None:
    seqlen, length = 60, 15
    indices = random_intervals(np.random.default_rng(n), 2, 2, seqlen, seqlen, n)
    expected = masks.to_dense(indices, causal, seqlen, seqlen)
    for first in range(0, seqlen, length):
        keys = first + length if causal else seqlen
        found = chunk_indices(paddle.to_tensor(indices), seqlen, first, keys)
        assert found.shape == [2, 2, keys, n]
        visible = masks.to_dense(found.numpy(), causal, length, keys)
        np.testing.assert_array_equal(visible, expected[:, :, first : first + length, :keys])
        assert not expected[:, :, first : first + length, keys:].any()


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
    group = dist.communication.group.Group(0, 7, [0])  # as fleet makes them for axes of degree 1
    again = context_parallel_attention(query, key, value, bounds, causal=True, group=group)
    np.testing.assert_array_equal(again.numpy(), expected.numpy())


def test_a_parallel_environment_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launcher has started several workers: else each would take the whole sequence for its own."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"^2 workers were launched; call .*init_parallel_env\(\) first"):
        split_sequence(paddle.zeros([1, 8]))


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
        r"startend_row_indices.shape\[2\].* got 4 .the mask is that of the whole sequence, 1 workers' 8 tokens each",
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
    "gather_dtype": (lambda: gather_sequence(paddle.zeros([2, 8], "int16")), TypeError, "part.dtype: expected one of"),
    "gather_empty": (lambda: gather_sequence(paddle.zeros([2, 0])), ValueError, r"part: .* got shape \[2, 0\]"),
    "scale": (
        lambda: context_parallel_attention(*operands(), softmax_scale=float("inf")),
        ValueError,
        "softmax_scale: expected a finite",
    ),
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
