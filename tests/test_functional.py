"""The attention call in dynamic mode: values, gradients and the return convention."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import paddle
import pytest
import reference
from functional_cases import (
    assert_same,
    call_with_grads,
    draw,
    expected,
    numpy_of,
    operands,
    packed,
    to_paddle,
    visible_of,
)

import paddle_flashmask
from paddle_flashmask import flashmask_attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("n", "causal"), reference.FORMS)
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_matches_reference(dtype, n, causal, mask_heads):
    tensors = draw(seed=n, seqlen_q=33, seqlen_k=57, dtype=dtype)
    indices = reference.random_intervals(np.random.default_rng(mask_heads), 2, mask_heads, 33, 57, n)
    actual = call_with_grads(tensors, dtype, indices=indices, causal=causal)
    assert_same(actual, expected(tensors, visible_of(tensors, indices, causal)), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 50), (50, 1), (130, 70)])
def test_without_indices(causal, seqlen_q, seqlen_k):
    tensors = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=3, heads_k=1)
    assert_same(
        call_with_grads(tensors, causal=causal),
        expected(tensors, visible_of(tensors, causal=causal)),
    )


@pytest.mark.parametrize("head_dim", [8, 40, 256])
def test_head_dims_and_scale(head_dim):
    tensors = draw(head_dim=head_dim, head_dim_v=264 - head_dim, heads_q=1, heads_k=1)
    indices = packed()
    assert_same(
        call_with_grads(tensors, indices=indices, causal=True, softmax_scale=0.25),
        expected(tensors, visible_of(tensors, indices, True), scale=0.25),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [3, (5, 2), (-1, 4), (6, -1), (-1, -1), [0, 0]])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(40, 40), (25, 40), (40, 25)])
def test_window_size(causal, window, seqlen_q, seqlen_k):
    tensors = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    visible = visible_of(tensors, causal=causal, window_size=tuple(window) if isinstance(window, list) else window)
    assert_same(call_with_grads(tensors, causal=causal, window_size=window), expected(tensors, visible))


@pytest.mark.parametrize("with_indices", [False, True])
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_block_mask(with_indices, mask_heads):
    tensors = draw(seqlen_q=150, seqlen_k=270)
    rng = np.random.default_rng(0)
    block_mask = rng.integers(0, 2, (2, mask_heads, 2, 3)).astype(np.int32)
    indices = reference.random_intervals(rng, 2, mask_heads, 150, 270, 2) if with_indices else None
    visible = visible_of(tensors, indices, True, block_mask=block_mask)
    actual = call_with_grads(tensors, indices=indices, causal=True, block_mask=to_paddle(block_mask))
    assert_same(actual, expected(tensors, visible))


def test_block_mask_with_window():
    tensors = draw(seqlen_q=150, seqlen_k=150)
    block_mask = np.array([[1, 0], [1, 1]], np.int32) * np.ones((2, 4, 1, 1), np.int32)
    visible = visible_of(tensors, block_mask=block_mask, window_size=(40, 30))
    actual = call_with_grads(tensors, block_mask=to_paddle(block_mask), window_size=(40, 30))
    assert_same(actual, expected(tensors, visible))


def test_rows_that_see_nothing():
    tensors = draw()
    indices = np.zeros((2, 1, 40, 1), np.int32)
    out, lse, *grads = call_with_grads(tensors, indices=indices, causal=True)
    assert np.isneginf(lse).all()
    for array in (out, *grads):
        assert not array.any()


def test_dropout_drops_what_the_reference_drops():
    tensors = draw(seed=3)
    indices = packed()
    seed_offset = np.array([-(2**40) - 7, 2**33 + 5], np.int64)
    keep, keep_scale = reference.dropout_keep(0.3, *seed_offset, 2, 4, 40, 40)
    wanted = expected(tensors, visible_of(tensors, indices, True), keep=keep, keep_scale=keep_scale)
    actual = call_with_grads(
        tensors, indices=indices, causal=True, dropout=0.3, fixed_seed_offset=paddle.to_tensor(seed_offset)
    )
    assert_same(actual, wanted)


def test_dropout_of_everything():
    tensors = draw()
    out, lse, *grads = call_with_grads(tensors, dropout=1.0)
    assert_same([lse], [expected(tensors, visible_of(tensors))[1]], names=["lse"])
    for array in (out, *grads):
        assert not array.any()


def test_dropout_draws_from_paddles_generator():
    q, k, v = operands(draw())

    def call():
        out, seed_offset = flashmask_attention(q, k, v, dropout=0.5, return_seed_offset=True)
        return numpy_of(out), seed_offset

    paddle.seed(11)
    first, first_numbers = call()
    second, second_numbers = call()
    paddle.seed(11)
    again, again_numbers = call()
    assert first_numbers.numpy().tolist() == again_numbers.numpy().tolist() != second_numbers.numpy().tolist()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    # What was returned reproduces the call.
    replayed = flashmask_attention(q, k, v, dropout=0.5, fixed_seed_offset=second_numbers)
    np.testing.assert_array_equal(numpy_of(replayed), second)


def test_no_dropout_outside_training():
    q, k, v = operands(draw())
    plain = flashmask_attention(q, k, v)
    paddle.seed(1)
    untouched = paddle.rand([4]).numpy()
    paddle.seed(1)
    np.testing.assert_array_equal(flashmask_attention(q, k, v, dropout=0.5, training=False).numpy(), plain.numpy())
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), untouched)  # nothing was drawn


def test_rng_name_draws_from_the_named_generator():
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    tracker = get_rng_state_tracker()
    q, k, v = operands(draw())

    def numbers(**kwargs):
        return flashmask_attention(q, k, v, dropout=0.5, return_seed_offset=True, **kwargs)[1].numpy().tolist()

    try:
        tracker.reset()
        tracker.add("flashmask_test", 5)
        paddle.seed(1)
        named, default = numbers(rng_name="flashmask_test"), numbers()
        tracker.reset()
        tracker.add("flashmask_test", 5)
        paddle.seed(2)
        assert numbers(rng_name="flashmask_test") == named
        assert numbers() != default
        with pytest.raises(ValueError, match=r"rng_name: expected one of .*flashmask_test.*, got 'other'"):
            numbers(rng_name="other")
    finally:
        tracker.reset()


def test_return_convention():
    q, k, v = operands(draw())
    alone = flashmask_attention(q, k, v)
    assert isinstance(alone, paddle.Tensor)
    assert alone.shape == [2, 40, 4, 24]
    with_lse = flashmask_attention(q, k, v, return_softmax_lse=True)
    assert [type(with_lse), len(with_lse)] == [list, 2]
    assert with_lse[1].shape == [2, 4, 40]
    assert with_lse[1].dtype == paddle.float32
    assert with_lse[1].stop_gradient
    assert not with_lse[0].stop_gradient
    with_seed = flashmask_attention(q, k, v, return_seed_offset=True)
    assert [type(with_seed), len(with_seed)] == [list, 2]
    assert with_seed[1].numpy().tolist() == [0, 0]
    everything = flashmask_attention(
        q,
        k,
        v,
        return_softmax_lse=True,
        return_seed_offset=True,
        fixed_seed_offset=paddle.to_tensor([3, 4], dtype="int64"),
    )
    assert [t.shape for t in everything] == [[2, 40, 4, 24], [2, 4, 40], [2]]
    assert everything[2].numpy().tolist() == [3, 4]


def test_signature_is_paddles_and_one_keyword_more():
    paddles = getattr(paddle.nn.functional, "flashmask_attention", None)
    if paddles is None:
        pytest.skip("this Paddle has no flashmask_attention")
    theirs, ours = inspect.signature(paddles).parameters, inspect.signature(flashmask_attention).parameters
    if "block_mask" not in theirs:
        pytest.skip("this Paddle's flashmask_attention is older than the signature that is followed")
    assert [*theirs, "deterministic"] == list(ours)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name


def test_paddles_own_op_is_left_alone():
    """Registering an op under a name that Paddle has replaces Paddle's."""
    from paddle_flashmask import _op

    assert not hasattr(paddle._C_ops, _op.OP_NAME)


def test_one_function_under_every_name():
    from paddle_flashmask.incubate.nn.functional import flashmask_attention as by_incubate

    assert by_incubate is flashmask_attention is paddle_flashmask.flashmask_attention
    assert paddle_flashmask.incubate.nn.functional.flashmask_attention is flashmask_attention
    assert {"flashmask_attention", "masks", "incubate"} <= set(dir(paddle_flashmask))
    assert paddle_flashmask.paddleformers.__name__ == "paddle_flashmask.paddleformers"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        paddle_flashmask.nothing  # noqa: B018


def test_submodules_as_attributes():
    """In a process of its own: here others have imported them."""
    script = """
import sys
import paddle_flashmask
nn = paddle_flashmask.incubate.nn
assert "functional" in dir(nn)
assert "paddle" not in sys.modules, "imported before it is needed"
assert nn.functional.flashmask_attention is paddle_flashmask.flashmask_attention
try:
    nn.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'paddle_flashmask.incubate.nn' has no attribute 'nothing'" in done.stdout


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 3, 2, 1), (2, 1, 0, 3)])
def test_views_of_any_layout(axes):
    tensors = draw()
    q, k, v = operands(tensors)
    views = [t.transpose(axes).contiguous().transpose(np.argsort(axes).tolist()) for t in (q, k, v)]
    if hasattr(views[0], "is_contiguous"):
        assert not views[0].is_contiguous()
    out = flashmask_attention(*views, to_paddle(packed()), causal=True)
    grads = paddle.grad([out], [q, k, v], [to_paddle(tensors.dout, "float32")])
    wanted = expected(tensors, visible_of(tensors, packed(), True))
    actual = [numpy_of(t) for t in (out, *grads)]
    assert_same(actual, (wanted[0], *wanted[2:]), names=("out", "dq", "dk", "dv"))


def test_views_of_indices_and_of_the_gradient():
    tensors = draw()
    q, k, v = operands(tensors)
    indices = np.repeat(packed(), 2, axis=3) + np.array([0, 5], np.int32)
    strided = to_paddle(indices.transpose(0, 1, 3, 2).copy()).transpose([0, 1, 3, 2])
    out = flashmask_attention(q, k, v, strided, causal=True)
    grads = paddle.grad(
        [out.transpose([0, 3, 2, 1])], [q, k, v], [to_paddle(tensors.dout.transpose(0, 3, 2, 1).copy(), "float32")]
    )
    wanted = expected(tensors, visible_of(tensors, indices, True))
    assert_same([numpy_of(t) for t in (out, *grads)], (wanted[0], *wanted[2:]), names=("out", "dq", "dk", "dv"))


def test_slice_of_a_fused_projection():
    """q, k and v cut out of one tensor, as a fused qkv projection makes them."""
    tensors = draw(heads_q=4, heads_k=4, head_dim=16, head_dim_v=16)
    fused = paddle.to_tensor(np.concatenate(tensors[:3], axis=2).astype(np.float32))
    fused.stop_gradient = False
    q, k, v = paddle.split(fused, 3, axis=2)
    out = flashmask_attention(q, k, v, to_paddle(packed()), causal=True)
    (grad,) = paddle.grad([out], [fused], [to_paddle(tensors.dout, "float32")])
    wanted = expected(tensors, visible_of(tensors, packed(), True))
    assert_same(
        [numpy_of(out), numpy_of(grad)],
        [wanted[0], np.concatenate(wanted[2:], axis=2)],
        names=("out", "dqkv"),
    )


def test_inputs_are_not_changed():
    tensors = draw()
    q, k, v = operands(tensors)
    indices = to_paddle(packed())
    out = flashmask_attention(q, k, v, indices, causal=True)
    dout = to_paddle(tensors.dout, "float32")
    paddle.grad([out], [q, k, v], [dout])
    for tensor, array in zip((q, k, v, dout), tensors, strict=True):
        np.testing.assert_array_equal(numpy_of(tensor), array)
    np.testing.assert_array_equal(indices.numpy(), packed())


def test_deterministic_is_accepted():
    tensors = draw()
    wanted = call_with_grads(tensors)
    for value in (True, False, None, np.True_):
        for got, want in zip(call_with_grads(tensors, deterministic=value), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_memory_is_linear():
    """16,384 tokens: a dense mask or score matrix would take 1 GiB in float32 and 256 MiB in bool."""
    import resource

    seqlen = 16384
    q, k, v = operands(draw(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, heads_q=1, heads_k=1, head_dim=8, head_dim_v=8))
    ends = (np.arange(seqlen) // 256 + 1) * 256
    indices = to_paddle(ends.astype(np.int32).reshape(1, 1, seqlen, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = flashmask_attention(q, k, v, indices, causal=True)
    paddle.grad([out], [q, k, v])
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 64
