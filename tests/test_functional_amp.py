"""Automatic mixed precision. On a CPU Paddle switches it off, so the tests set its state as auto_cast does on a GPU."""

from __future__ import annotations

import contextlib

import numpy as np
import paddle
import pytest
from functional_cases import assert_same, call_with_grads, draw, expected, operands, packed, to_paddle, visible_of

from paddle_flashmask import flashmask_attention


@contextlib.contextmanager
def amp_state(dtype, white=("flash_attn", "matmul"), black=(), level="O1"):
    """What `paddle.amp.auto_cast` sets where it is effective."""
    tracer = paddle.base.framework._dygraph_tracer()
    before = (tracer._amp_level, tracer._amp_dtype, tracer._get_amp_op_list())
    try:
        tracer._amp_level = getattr(paddle.base.core.AmpLevel, level)
        tracer._amp_dtype = dtype
        tracer._set_amp_op_list(set(white), set(black))
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before[:2]
        tracer._set_amp_op_list(*before[2])


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_to_the_amp_dtype(dtype, level):
    tensors = draw(dtype=dtype)
    q, k, v = operands(tensors)
    with amp_state(dtype, level=level):
        out = flashmask_attention(q, k, v, to_paddle(packed()), causal=True)
    assert out.dtype == getattr(paddle, dtype)
    grads = paddle.grad([out], [q, k, v], [to_paddle(tensors.dout, dtype)])
    assert {g.dtype for g in grads} == {paddle.float32}, "gradients come back in the dtype of the leaves"
    wanted = expected(tensors, visible_of(tensors, packed(), True))
    actual = [t.astype("float32").numpy() for t in (out, *grads)]
    assert_same(actual, (wanted[0], *wanted[2:]), dtype, names=("out", "dq", "dk", "dv"))


def test_mixed_dtypes_meet_under_amp():
    q, k, v = operands(draw())
    mixed = (q, k.astype("bfloat16"), v.astype("float16"))
    with pytest.raises(TypeError, match=r"key\.dtype: expected that of query, float32, got bfloat16"):
        flashmask_attention(*mixed)
    with amp_state("bfloat16"):
        assert flashmask_attention(*mixed).dtype == paddle.bfloat16


@pytest.mark.parametrize("name", ["flash_attn", "flashmask_attention"])
def test_black_list_computes_in_float32(name):
    q, k, v = (t.astype("bfloat16") for t in operands(draw()))
    with amp_state("bfloat16", black=[name]):
        assert flashmask_attention(q, k, v).dtype == paddle.float32


def test_on_no_list_stays():
    q, k, v = operands(draw())
    with amp_state("bfloat16", white=["matmul"]):
        assert flashmask_attention(q, k, v).dtype == paddle.float32


def test_float64_is_refused_under_amp_too():
    q = paddle.zeros([1, 8, 1, 8], "float64")
    with amp_state("bfloat16"), pytest.raises(TypeError, match=r"query\.dtype: .* got float64; cast it"):
        flashmask_attention(q, q, q)


@pytest.mark.filterwarnings("ignore:.*amp_guard can only be enabled.*")
def test_auto_cast_on_a_cpu_changes_nothing():
    tensors = draw()
    plain = call_with_grads(tensors)
    with paddle.amp.auto_cast(dtype="bfloat16", level="O1"):
        under = call_with_grads(tensors)
    for got, want in zip(under, plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_static_program_under_amp():
    if not getattr(paddle.base.framework, "in_pir_mode", None):
        pytest.skip("this Paddle has no AMP for static programs of this kind")
    tensors = draw(dtype="bfloat16")
    paddle.enable_static()
    try:
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            if not paddle.framework.in_pir_mode():
                pytest.skip("static programs are not PIR here")
            q, k, v = (paddle.static.data(n, list(t.shape), "float32") for n, t in zip("qkv", tensors[:3], strict=True))
            with paddle.amp.auto_cast(dtype="bfloat16", level="O1"):
                out = flashmask_attention(q, k, v, causal=True)
            assert str(out.dtype).endswith("bfloat16")
            out = out.astype("float32")
        feed = {n: t.astype(np.float32) for n, t in zip("qkv", tensors[:3], strict=True)}
        (actual,) = paddle.static.Executor(paddle.CPUPlace()).run(program, feed=feed, fetch_list=[out])
    finally:
        paddle.disable_static()
    assert_same([actual], [expected(tensors, visible_of(tensors, causal=True))[0]], "bfloat16", names=["out"])
