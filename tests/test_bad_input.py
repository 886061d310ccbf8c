"""Every bad input is refused by an error that names the argument, what was expected and what came.

All cases run in this one process, with a good call after each: none may crash it or leave it broken.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddle_flashmask import _op, flashmask_attention

NAN, INF = float("nan"), float("inf")


def floats(*shape: int, dtype: str = "float32"):
    return paddle.ones(shape, dtype) if dtype != "float16" else paddle.ones(shape, "float32").astype(dtype)


def rows(*shape: int, dtype: str = "int32"):
    return paddle.full(shape, 16, dtype)


def good() -> dict:
    """A call that works: 2 batches, 16 queries and 24 keys, 4 and 2 heads, head dims 8 and 16."""
    return {"query": floats(2, 16, 4, 8), "key": floats(2, 24, 2, 8), "value": floats(2, 24, 2, 16)}


def sparse():
    return paddle.sparse.sparse_coo_tensor([[0], [0], [0], [0]], [1.0], [2, 16, 4, 8])


def without_memory():
    tensor = floats(2, 16, 4, 8)
    tensor._clear_data()
    return tensor


# (what is changed in the good call, the error, what its message must say)
CASES = {
    # tensors at all
    "query_none": ({"query": None}, TypeError, r"query: expected a paddle.Tensor, got None"),
    "query_numpy": (
        {"query": np.ones((2, 16, 4, 8), np.float32)},
        TypeError,
        r"query: expected a paddle.Tensor, got array.*ndarray",
    ),
    "key_list": ({"key": [[1.0]]}, TypeError, r"key: expected a paddle.Tensor, got \[\[1.0\]\] \(list\)"),
    "value_float": ({"value": 1.0}, TypeError, r"value: expected a paddle.Tensor, got 1.0"),
    "indices_numpy": (
        {"startend_row_indices": np.zeros((2, 1, 24, 2), np.int32)},
        TypeError,
        r"startend_row_indices: expected a paddle.Tensor",
    ),
    "indices_bool": ({"startend_row_indices": True}, TypeError, r"startend_row_indices: expected a paddle.Tensor"),
    "block_mask_numpy": (
        {"block_mask": np.ones((2, 1, 1, 1), np.int32)},
        TypeError,
        r"block_mask: expected a paddle.Tensor",
    ),
    "query_sparse": ({"query": lambda: sparse()}, (TypeError, ValueError), r"query.* dense"),
    "query_without_memory": ({"query": lambda: without_memory()}, ValueError, r"query.*(no data|memory)"),
    "query_empty_object": ({"query": lambda: paddle.Tensor()}, (TypeError, ValueError), r"query"),
    # dtypes
    "float64": (
        {"query": lambda: floats(2, 16, 4, 8, dtype="float64")},
        TypeError,
        r"query.dtype: expected float32, bfloat16 or float16, got float64; cast it",
    ),
    "query_int32": ({"query": lambda: rows(2, 16, 4, 8)}, TypeError, r"query.dtype: expected float32.*got int32"),
    "key_bool": ({"key": lambda: rows(2, 24, 2, 8).astype("bool")}, TypeError, r"key.dtype: expected.*got bool"),
    "value_complex": (
        {"value": lambda: floats(2, 24, 2, 16).astype("complex64")},
        TypeError,
        r"value.dtype: expected.*got complex64",
    ),
    "key_bfloat16": (
        {"key": lambda: floats(2, 24, 2, 8, dtype="bfloat16")},
        TypeError,
        r"key.dtype: expected that of query, float32, got bfloat16",
    ),
    "value_float16": (
        {"value": lambda: floats(2, 24, 2, 16, dtype="float16")},
        TypeError,
        r"value.dtype: expected that of query, float32, got float16",
    ),
    "indices_int64": (
        {"startend_row_indices": lambda: rows(2, 1, 24, 2, dtype="int64")},
        TypeError,
        r"startend_row_indices.dtype: expected int32, got .*int64",
    ),
    "indices_float": (
        {"startend_row_indices": lambda: floats(2, 1, 24, 2)},
        TypeError,
        r"startend_row_indices.dtype: expected int32, got .*float32",
    ),
    "block_mask_bool": (
        {"block_mask": lambda: rows(2, 1, 1, 1).astype("bool")},
        TypeError,
        r"block_mask.dtype: expected int32, got .*bool",
    ),
    # ranks
    "query_rank_3": (
        {"query": lambda: floats(16, 4, 8)},
        ValueError,
        r"query: expected rank 4.*got shape \[16, 4, 8\]",
    ),
    "key_rank_5": ({"key": lambda: floats(1, 2, 24, 2, 8)}, ValueError, r"key: expected rank 4"),
    "value_rank_0": ({"value": lambda: floats()}, ValueError, r"value: expected rank 4.*got shape \[\]"),
    "indices_rank_3": (
        {"startend_row_indices": lambda: rows(2, 24, 2)},
        ValueError,
        r"startend_row_indices: expected rank 4.*\[2, 24, 2\]",
    ),
    "block_mask_rank_2": ({"block_mask": lambda: rows(1, 1)}, ValueError, r"block_mask: expected rank 4"),
    # each dimension
    "key_batch": ({"key": lambda: floats(3, 24, 2, 8)}, ValueError, r"key.shape\[0\]: expected .*2, got 3"),
    "value_batch": ({"value": lambda: floats(1, 24, 2, 16)}, ValueError, r"value.shape\[0\]: expected .*2, got 1"),
    "value_seqlen": ({"value": lambda: floats(2, 23, 2, 16)}, ValueError, r"value.shape\[1\]: expected .*24, got 23"),
    "value_heads": ({"value": lambda: floats(2, 24, 4, 16)}, ValueError, r"value.shape\[2\]: expected .*2, got 4"),
    "key_head_dim": ({"key": lambda: floats(2, 24, 2, 16)}, ValueError, r"key.shape\[3\]: expected .*8, got 16"),
    "heads_not_divisible": (
        {"query": lambda: floats(2, 16, 3, 8)},
        ValueError,
        r"query.shape\[2\]: expected a multiple of the 2 heads of key, got 3",
    ),
    "fewer_query_heads": ({"query": lambda: floats(2, 16, 1, 8)}, ValueError, r"query.shape\[2\]: expected a multiple"),
    "zero_batch": (
        {
            "query": lambda: floats(0, 16, 4, 8),
            "key": lambda: floats(0, 24, 2, 8),
            "value": lambda: floats(0, 24, 2, 16),
        },
        ValueError,
        r"query.shape\[0\]: expected at least 1, got 0",
    ),
    "empty_queries": ({"query": lambda: floats(2, 0, 4, 8)}, ValueError, r"query.shape\[1\]: expected at least 1"),
    "empty_keys": (
        {"key": lambda: floats(2, 0, 2, 8), "value": lambda: floats(2, 0, 2, 16)},
        ValueError,
        r"key.shape\[1\]: expected at least 1",
    ),
    "zero_heads": (
        {"key": lambda: floats(2, 24, 0, 8), "value": lambda: floats(2, 24, 0, 16)},
        ValueError,
        r"key.shape\[2\]: expected at least 1",
    ),
    "zero_head_dim": ({"value": lambda: floats(2, 24, 2, 0)}, ValueError, r"value.shape\[3\]: expected at least 1"),
    "head_dim_12": (
        {"query": lambda: floats(2, 16, 4, 12), "key": lambda: floats(2, 24, 2, 12)},
        ValueError,
        r"query.shape\[3\]: expected a head dim that is a multiple of 8, at most 256, got 12",
    ),
    "head_dim_264": (
        {"query": lambda: floats(2, 16, 4, 264), "key": lambda: floats(2, 24, 2, 264)},
        ValueError,
        r"query.shape\[3\]: .*got 264",
    ),
    "head_dim_v_4": ({"value": lambda: floats(2, 24, 2, 4)}, ValueError, r"value.shape\[3\]: .*multiple of 8.*got 4"),
    "head_dim_v_512": ({"value": lambda: floats(2, 24, 2, 512)}, ValueError, r"value.shape\[3\]: .*got 512"),
    # masks
    "indices_batch": (
        {"startend_row_indices": lambda: rows(1, 1, 24, 2)},
        ValueError,
        r"startend_row_indices.shape\[0\]: expected .*2, got 1",
    ),
    "indices_seqlen_of_query": (
        {"startend_row_indices": lambda: rows(2, 1, 16, 2)},
        ValueError,
        r"startend_row_indices.shape\[2\]: expected .*24, got 16",
    ),
    "indices_heads": (
        {"startend_row_indices": lambda: rows(2, 3, 24, 2)},
        ValueError,
        r"startend_row_indices.shape\[1\]: expected 1 or .*2 or .*4, got 3",
    ),
    "indices_zero_heads": (
        {"startend_row_indices": lambda: rows(2, 0, 24, 2)},
        ValueError,
        r"startend_row_indices.shape\[1\]: expected at least 1",
    ),
    **{
        f"form_{n}_{causal}": (
            {"startend_row_indices": (lambda n=n: rows(2, 1, 24, n)), "causal": causal},
            ValueError,
            rf"startend_row_indices.shape\[3\]: expected .* when causal={causal}, got {n}",
        )
        for n, causal in ((1, False), (3, False), (5, False), (3, True), (4, True), (8, True))
    },
    "window_and_indices": (
        {"startend_row_indices": lambda: rows(2, 1, 24, 2), "window_size": 4},
        ValueError,
        r"window_size: expected None when startend_row_indices is given",
    ),
    "window_negative": ({"window_size": -2}, ValueError, r"window_size: expected at least -1, got -2"),
    "window_float": ({"window_size": 4.0}, TypeError, r"window_size: expected an integer, got 4.0"),
    "window_bool": ({"window_size": True}, TypeError, r"window_size: expected an integer"),
    "window_three": ({"window_size": (1, 2, 3)}, ValueError, r"window_size: expected .*\(1, 2, 3\)"),
    "window_string": ({"window_size": "4"}, TypeError, r"window_size: expected an integer"),
    "window_huge": ({"window_size": 2**40}, ValueError, r"window_size: expected at most"),
    "block_mask_blocks": (
        {"block_mask": lambda: rows(2, 1, 2, 1)},
        ValueError,
        r"block_mask.shape\[2\]: expected ceil\(seqlen_q / 128\) = 1, got 2",
    ),
    "block_mask_key_blocks": ({"block_mask": lambda: rows(2, 1, 1, 3)}, ValueError, r"block_mask.shape\[3\]: .*got 3"),
    "block_mask_heads": ({"block_mask": lambda: rows(2, 3, 1, 1)}, ValueError, r"block_mask.shape\[1\]: .*got 3"),
    "block_mask_other_heads": (
        {"block_mask": lambda: rows(2, 2, 1, 1), "startend_row_indices": lambda: rows(2, 1, 24, 2)},
        ValueError,
        r"block_mask.shape\[1\]: expected startend_row_indices.shape\[1\] = 1, got 2",
    ),
    "block_mask_batch": ({"block_mask": lambda: rows(1, 1, 1, 1)}, ValueError, r"block_mask.shape\[0\]: .*got 1"),
    # numbers
    "scale_nan": ({"softmax_scale": NAN}, ValueError, r"softmax_scale: expected a finite float32, got nan"),
    "scale_inf": ({"softmax_scale": -INF}, ValueError, r"softmax_scale: expected a finite float32, got -inf"),
    "scale_overflows": ({"softmax_scale": 1e39}, ValueError, r"softmax_scale: expected a finite float32, got 1e\+39"),
    "scale_string": ({"softmax_scale": "1"}, TypeError, r"softmax_scale: expected a float, got '1'"),
    "scale_bool": ({"softmax_scale": True}, TypeError, r"softmax_scale: expected a float, got True"),
    "scale_tensor": (
        {"softmax_scale": lambda: floats(1)},
        TypeError,
        r"softmax_scale: expected a float, got float32",
    ),
    "scale_complex": ({"softmax_scale": 1j}, TypeError, r"softmax_scale: expected a float, got 1j"),
    "scale_array": ({"softmax_scale": np.ones(2)}, TypeError, r"softmax_scale: expected a float"),
    "scale_huge_int": ({"softmax_scale": 10**400}, ValueError, r"softmax_scale: expected a finite float32"),
    "dropout_negative": ({"dropout": -0.1}, ValueError, r"dropout: expected a probability from 0 to 1, got -0.1"),
    "dropout_above_one": ({"dropout": 1.5}, ValueError, r"dropout: expected a probability from 0 to 1, got 1.5"),
    "dropout_nan": ({"dropout": NAN}, ValueError, r"dropout: expected a probability from 0 to 1, got nan"),
    "dropout_none": ({"dropout": None}, TypeError, r"dropout: expected a float, got None"),
    "dropout_bool": ({"dropout": True}, TypeError, r"dropout: expected a float, got True"),
    "dropout_bad_outside_training": ({"dropout": 2.0, "training": False}, ValueError, r"dropout: expected a prob"),
    "seed_list": ({"fixed_seed_offset": [1, 2]}, TypeError, r"fixed_seed_offset: expected a paddle.Tensor"),
    "seed_int32": (
        {"fixed_seed_offset": lambda: rows(2)},
        TypeError,
        r"fixed_seed_offset: expected an int64 tensor of shape \[2\], got int32 tensor",
    ),
    "seed_three": (
        {"fixed_seed_offset": lambda: rows(3, dtype="int64")},
        ValueError,
        r"fixed_seed_offset: expected an int64 tensor of shape \[2\], got int64 tensor of shape \[3\]",
    ),
    "seed_rank_2": (
        {"fixed_seed_offset": lambda: rows(1, 2, dtype="int64")},
        ValueError,
        r"fixed_seed_offset: .*\[1, 2\]",
    ),
    "seed_empty": ({"fixed_seed_offset": lambda: rows(0, dtype="int64")}, ValueError, r"fixed_seed_offset: .*\[0\]"),
    # flags and strings
    **{
        f"{name}_{type(wrong).__name__}": ({name: wrong}, TypeError, rf"{name}: expected a bool, got")
        for name in ("causal", "training", "return_softmax_lse", "return_seed_offset", "deterministic")
        for wrong in (1, "True")
    },
    "causal_none": ({"causal": None}, TypeError, r"causal: expected a bool, got None"),
    "causal_tensor": (
        {"causal": lambda: paddle.to_tensor(True)},
        TypeError,
        r"causal: expected a bool, got bool tensor",
    ),
    "rng_name_none": ({"rng_name": None}, TypeError, r"rng_name: expected a str, got None"),
    "rng_name_unknown": ({"rng_name": "nobody", "dropout": 0.5}, ValueError, r"rng_name: expected one of .*'nobody'"),
    "name_number": ({"name": 3}, TypeError, r"name: expected a str, got 3"),
}


def made(arguments: dict) -> dict:
    return {name: value() if callable(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    changes, error, message = CASES[case]
    with pytest.raises(error, match=message):
        flashmask_attention(**{**good(), **made(changes)})
    out = flashmask_attention(**good())
    np.testing.assert_allclose(out.numpy(), 1.0, rtol=1e-6)


def test_positional_arguments_end_at_the_mask():
    with pytest.raises(TypeError, match="positional"):
        flashmask_attention(*good().values(), None, 0.0)


def test_device_mismatch():
    """Other devices are not there on a test machine: places that only say so."""
    from paddle_flashmask import _checks

    class OnGpu:
        place = "Place(gpu:0)"

    query = floats(1, 8, 1, 8)
    with pytest.raises(
        ValueError, match=r"key: expected a tensor on the device of query, Place\(cpu\), got Place\(gpu:0\)"
    ):
        _checks.same_device(query, {"startend_row_indices": None, "key": OnGpu()})


@pytest.mark.parametrize(
    "bad",
    [
        {"softmax_scale": NAN},
        {"dropout": 0.5},
        {"dropout": NAN},
        {"seed_offset": lambda: rows(2), "dropout": 0.5},
        {"seed_offset": lambda: rows(1, dtype="int64"), "dropout": 0.5},
        {"key": lambda: floats(2, 24, 3, 8)},
        {"key": lambda: floats(24, 2, 8)},
        {"key": lambda: floats(2, 24, 2, 8, dtype="float16")},
        {"query": lambda: floats(2, 16, 4, 8, dtype="float64")},
        {"query": lambda: floats(2, 16, 4, 12)},
        {"query": lambda: floats(2, 0, 4, 8)},
        {"query": sparse},
        {"query": without_memory},
        {"value": lambda: floats(2, 24, 2, 264)},
        {"startend_row_indices": lambda: rows(2, 1, 24, 3)},
        {"startend_row_indices": lambda: rows(2, 1, 24, 2, dtype="int64")},
        {"startend_row_indices": lambda: rows(2, 3, 24, 2)},
        {"startend_row_indices": lambda: rows(2, 24, 2)},
        {"block_mask": lambda: rows(2, 1, 1, 2)},
        {"block_mask": lambda: rows(2, 2, 1, 1), "startend_row_indices": lambda: rows(2, 1, 24, 2)},
    ],
)
def test_the_op_itself_refuses(bad):
    """Without the Python layer, as a static program calls it."""
    arguments = {
        **good(),
        "startend_row_indices": None,
        "block_mask": None,
        "seed_offset": None,
        "causal": False,
        "softmax_scale": 1.0,
        "dropout": 0.0,
        "deterministic": False,
    }
    with pytest.raises((ValueError, OSError), match="flashmask_attention: "):  # OSError: Paddle 2.6
        _op.run(**{**arguments, **made(bad)})
    np.testing.assert_allclose(_op.run(**arguments)[0].numpy(), 1.0, rtol=1e-6)


# A core that fails, and a call: argv has the status and "forward" or "backward".
FAILING_CORE = """
extern "C" {
int status = 0;
void set_status(int value) { status = value; }
int flashmask_forward(const void*) { return status; }
int flashmask_backward(const void*) { return status; }
const char* flashmask_last_error() { return "what the core says"; }
}
"""
FAILING_CALL = """
import ctypes, sys
import paddle
from paddle_flashmask import flashmask_attention

library, status, direction = sys.argv[1:]
query = paddle.ones([1, 8, 2, 8])
query.stop_gradient = False
out = flashmask_attention(query, query, query) if direction == "backward" else None
ctypes.CDLL(library).set_status(int(status))
try:
    out.sum().backward() if direction == "backward" else flashmask_attention(query, query, query)
except Exception as error:
    print(type(error).__mro__, error)
"""


@pytest.fixture(scope="module")
def failing_core(tmp_path_factory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = tmp_path_factory.mktemp("core") / "failing.cc"
    source.write_text(FAILING_CORE)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (1, "ValueError"),
        (2, "NotImplementedError"),
        (3, "OSError"),
        (4, "MemoryError"),
    ],
)
def test_failures_of_the_core_have_their_class(failing_core, status, exception, direction):
    """The statuses of flashmask.h that no call on this machine gives: a library loaded before the core's gives them."""
    command = [sys.executable, "-c", FAILING_CALL, failing_core, str(status), direction]
    environment = {**os.environ, "LD_PRELOAD": str(failing_core)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "what the core says" in ran.stdout, ran.stdout
    if hasattr(paddle._C_ops, "_run_custom_op"):  # Paddle 2.6 knows OSError and RuntimeError only
        assert f"'{exception}'" in ran.stdout


def test_wild_row_indices_are_clipped():
    """No value is an error: whatever lies outside [0, seqlen_q] means the nearest end."""
    values = np.array([-(2**31), -5, 0, 7, 16, 25, 2**31 - 1], np.int32)
    rng = np.random.default_rng(0)
    for n, causal in ((1, True), (2, True), (2, False), (4, False)):
        wild = rng.choice(values, (2, 1, 24, n)).astype(np.int32)
        for indices in (wild, wild.clip(0, 16)):
            arguments = {**good(), "startend_row_indices": paddle.to_tensor(indices), "causal": causal}
            out = flashmask_attention(**arguments).numpy()
            assert np.isfinite(out).all()
            if indices is wild:
                first = out
        np.testing.assert_array_equal(first, out)


def test_nan_and_inf_behind_the_last_visible_key_do_not_leak():
    """Padding rows are often uninitialised memory."""
    arguments = good()
    for bad in (NAN, INF):
        key, value = floats(2, 24, 2, 8), floats(2, 24, 2, 16)
        key[:, 20:], value[:, 20:] = bad, bad
        indices = rows(2, 1, 24, 1)
        indices[:, :, 20:] = 0
        out = flashmask_attention(arguments["query"], key, value, indices, causal=True)
        assert np.isfinite(out.numpy()).all()


@pytest.mark.parametrize("differentiated", [("query",), ("key", "value"), ("query", "key", "value")])
@pytest.mark.parametrize("backward", [True, False])
def test_second_derivative_is_refused(differentiated: tuple[str, ...], backward: bool):
    """Paddle would take it to be zero. The first one may be asked for with create_graph."""
    arguments = {name: paddle.rand(tensor.shape) for name, tensor in good().items()}
    inputs = [arguments[name] for name in differentiated]
    for tensor in inputs:
        tensor.stop_gradient = False
    out = flashmask_attention(**arguments)
    gradients = paddle.grad([out.square().sum()], inputs, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    assert float(penalty) > 0
    again = penalty.backward if backward else functools.partial(paddle.grad, [penalty], inputs)
    with pytest.raises((ValueError, OSError), match="second derivatives are not implemented"):  # OSError: Paddle 2.6
        again()
