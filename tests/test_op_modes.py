"""Every way in which Paddle runs an op, against the float64 reference: outputs and gradients."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
import reference
from functional_cases import (
    Tensors,
    assert_same,
    draw,
    expected,
    numpy_of,
    operands,
    packed,
    to_paddle,
    visible_of,
)
from paddle.distributed.fleet.utils import recompute

from paddle_flashmask import flashmask_attention

PADDLE_3 = int(paddle.version.full_version.split(".")[0]) >= 3
needs_sot = pytest.mark.skipif(not PADDLE_3, reason="Paddle 2.6's SOT does not run this")


def attention(q, k, v, indices):
    """The call that most tests transform."""
    return flashmask_attention(q, k, v, indices, causal=True)


def wanted_of(tensors: Tensors, indices: np.ndarray):
    out, _, *grads = expected(tensors, visible_of(tensors, indices, True))
    return (out, *grads)


def run(function, tensors: Tensors, indices: np.ndarray):
    """out, dq, dk, dv of a dynamic call, by backward()."""
    q, k, v = operands(tensors)
    out = function(q, k, v, to_paddle(indices))
    paddle.autograd.backward([out], [to_paddle(tensors.dout, "float32")])
    return [numpy_of(t) for t in (out, q.grad, k.grad, v.grad)]


def check(function, tensors: Tensors | None = None, indices: np.ndarray | None = None):
    tensors = draw() if tensors is None else tensors
    indices = packed() if indices is None else indices
    assert_same(run(function, tensors, indices), wanted_of(tensors, indices), names=("out", "dq", "dk", "dv"))


def documents(seqlen: int, length: int, batch: int) -> np.ndarray:
    ends = np.minimum((np.arange(seqlen) // length + 1) * length, seqlen).astype(np.int32)
    return np.broadcast_to(ends[None, None, :, None], (batch, 1, seqlen, 1)).copy()


def specs(window: bool = False):
    """Input specifications with unknown batch and sequence lengths."""
    spec = paddle.static.InputSpec
    shapes = ([None, None, 4, 16], [None, None, 2, 16], [None, None, 2, 24])
    tensors = [spec(shape, "float32", name) for shape, name in zip(shapes, "qkv", strict=True)]
    return tensors if window else [*tensors, spec([None, None, None, 1], "int32", "indices")]


def test_dynamic():
    check(attention)


def test_no_grad():
    tensors = draw()
    q, k, v = operands(tensors)
    with paddle.no_grad():
        out = attention(q, k, v, to_paddle(packed()))
    assert out.stop_gradient
    assert out.is_leaf  # no graph holds q, k and v: recompute saves memory by that
    assert_same([numpy_of(out)], wanted_of(tensors, packed())[:1], names=["out"])


@pytest.mark.parametrize("wanting", ["q", "k", "v", "kv"])
def test_some_gradients_only(wanting):
    tensors = draw()
    leaves = dict(zip("qkv", operands(tensors), strict=True))
    for name, leaf in leaves.items():
        leaf.stop_gradient = name not in wanting
    out = attention(*leaves.values(), to_paddle(packed()))
    paddle.autograd.backward([out], [to_paddle(tensors.dout, "float32")])
    wanted = dict(zip("qkv", wanted_of(tensors, packed())[1:], strict=True))
    for name, leaf in leaves.items():
        if name in wanting:
            assert_same([numpy_of(leaf.grad)], [wanted[name]], names=[f"d{name}"])
        else:
            assert leaf.grad is None


def test_twice_in_one_graph():
    """Two calls share q, k and v; a third takes an output as its input."""
    tensors = draw(heads_k=4, head_dim_v=16)
    q, k, v = operands(tensors)
    first = attention(q, k, v, to_paddle(packed()))
    second = flashmask_attention(q, k, v, window_size=3)
    third = flashmask_attention(first, k, second)
    grads = paddle.grad([third], [q, k, v], [to_paddle(tensors.dout, "float32")])

    scale = 16**-0.5
    causal, window = visible_of(tensors, packed(), True), visible_of(tensors, window_size=3)
    everything = np.ones_like(causal)
    a = expected(tensors, causal)[0]
    b = expected(tensors, window)[0]
    c = reference.attention(a, tensors.k, b, everything, scale)[0]
    da, dk3, db = reference.attention_grads(a, tensors.k, b, everything, scale, tensors.dout)
    dq1, dk1, dv1 = reference.attention_grads(*tensors[:3], causal, scale, da)
    dq2, dk2, dv2 = reference.attention_grads(*tensors[:3], window, scale, db)
    wanted = [c, dq1 + dq2, dk1 + dk2 + dk3, dv1 + dv2]
    assert_same([numpy_of(t) for t in (third, *grads)], wanted, names=("out", "dq", "dk", "dv"))


def test_backward_twice():
    tensors = draw()
    q, k, v = operands(tensors)
    out = attention(q, k, v, to_paddle(packed()))
    dout = to_paddle(tensors.dout, "float32")
    once = paddle.grad([out], [q, k, v], [dout], retain_graph=True)
    again = paddle.grad([out], [q, k, v], [dout])
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize("full_graph", [True, pytest.param(False, marks=needs_sot)])
class TestToStatic:
    def test_call(self, full_graph):
        check(paddle.jit.to_static(attention, full_graph=full_graph))

    def test_new_lengths(self, full_graph):
        """One transformed function, three sizes."""
        function = paddle.jit.to_static(attention, full_graph=full_graph)
        for batch, seqlen in ((2, 40), (1, 70), (3, 33)):
            check(function, draw(batch=batch, seqlen_q=seqlen, seqlen_k=seqlen), documents(seqlen, 13, batch))

    def test_inside_other_code(self, full_graph):
        """Control flow, projections and the op in one function."""
        tensors = draw()

        def function(q, k, v, indices, layers):
            out = q * 1.0
            for layer in range(layers):
                if layer % 2 == 0:
                    out = out + paddle.mean(attention(q, k, v, indices), axis=-1, keepdim=True)
                else:
                    out = out * 0.5
            return out

        def run_one(f):
            q, k, v = operands(tensors)
            out = f(q, k, v, to_paddle(packed()), 3)
            out.sum().backward()
            return [t.numpy() for t in (out, q.grad, k.grad, v.grad)]

        for got, want in zip(
            run_one(paddle.jit.to_static(function, full_graph=full_graph)), run_one(function), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

    def test_every_return_value(self, full_graph):
        tensors = draw()

        def function(q, k, v, indices):
            return flashmask_attention(
                q, k, v, indices, causal=True, return_softmax_lse=True, return_seed_offset=True, dropout=0.4
            )

        q, k, v = operands(tensors)
        out, lse, seed_offset = paddle.jit.to_static(function, full_graph=full_graph)(q, k, v, to_paddle(packed()))
        grads = paddle.grad([out], [q, k, v], [to_paddle(tensors.dout, "float32")])
        keep, keep_scale = reference.dropout_keep(0.4, *seed_offset.numpy(), 2, 4, 40, 40)
        wanted = expected(tensors, visible_of(tensors, packed(), True), keep=keep, keep_scale=keep_scale)
        assert_same([numpy_of(t) for t in (out, lse, *grads)], wanted)

    def test_window_and_block_mask(self, full_graph):
        tensors = draw(seqlen_q=150, seqlen_k=140)
        block_mask = np.array([[1, 0], [1, 1]], np.int32) * np.ones((2, 1, 1, 1), np.int32)

        def function(q, k, v, blocks):
            return flashmask_attention(q, k, v, window_size=(20, 9), block_mask=blocks)

        visible = visible_of(tensors, window_size=(20, 9), block_mask=block_mask)
        out, _, *grads = expected(tensors, visible)
        actual = run(paddle.jit.to_static(function, full_graph=full_graph), tensors, block_mask)
        assert_same(actual, (out, *grads), names=("out", "dq", "dk", "dv"))

    def test_seed_holds(self, full_graph):
        def function(q):
            return flashmask_attention(q, q, q, dropout=0.5)

        function = paddle.jit.to_static(function, full_graph=full_graph)
        q = operands(draw())[0]
        runs = []
        for seed in (1, None, 1):
            if seed is not None:
                paddle.seed(seed)
            runs.append(function(q).numpy())
        np.testing.assert_array_equal(runs[0], runs[2])
        assert np.abs(runs[0] - runs[1]).max() > 0.1


def test_sot_keeps_one_graph():
    """The call is one operation to SOT, as Paddle's own: nothing falls back to Python."""
    pytest.importorskip("paddle.jit.marker", reason="this Paddle cannot mark a function as one call")
    from paddle.jit.sot.psdb import check_no_breakgraph

    @check_no_breakgraph
    def function(q, k, v, indices):
        return flashmask_attention(q, k, v, indices, causal=True, return_softmax_lse=True)[0] * 1.0

    check(paddle.jit.to_static(function, full_graph=False))


def test_to_static_with_unknown_sizes():
    """One program, built before any size is known, serves several."""
    function = paddle.jit.to_static(attention, input_spec=specs(), full_graph=True)
    for batch, seqlen in ((2, 40), (1, 70)):
        check(function, draw(batch=batch, seqlen_q=seqlen, seqlen_k=seqlen), documents(seqlen, 13, batch))
    assert len(function.program_cache) == 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [4, (3, 8), (-1, 2), (7, -1), (-1, -1), (2, 0)])
def test_window_with_unknown_sizes(window, causal):
    """The window's indices are then made by the program itself."""

    class Windowed(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.arguments = {"window_size": window, "causal": causal}

        def forward(self, q, k, v):
            return flashmask_attention(q, k, v, **self.arguments)

    static = paddle.jit.to_static(Windowed(), input_spec=specs(window=True), full_graph=True)
    for seqlen_q, seqlen_k in ((40, 40), (25, 40), (40, 25)):
        tensors = draw(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        out, _, *grads = expected(tensors, visible_of(tensors, causal=causal, window_size=window))
        actual = run(lambda q, k, v, _: static(q, k, v), tensors, packed())
        assert_same(actual, (out, *grads), names=("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recompute(use_reentrant, dropout):
    """The second forward pass drops what the first one dropped."""
    if not PADDLE_3 and not use_reentrant:
        pytest.skip("Paddle 2.6 restores no CPU generator here")
    tensors, indices = draw(), packed()

    def function(q, k, v, rows):
        return flashmask_attention(
            q, k, v, rows, causal=True, dropout=dropout, return_softmax_lse=False, return_seed_offset=False
        )

    paddle.seed(5)
    plain = run(function, tensors, indices)
    paddle.seed(5)
    recomputed = run(
        lambda q, k, v, rows: recompute(function, q, k, v, rows, use_reentrant=use_reentrant), tensors, indices
    )
    for got, want in zip(recomputed, plain, strict=True):
        np.testing.assert_array_equal(got, want)
    if dropout == 0.0:
        assert_same(plain, wanted_of(tensors, indices), names=("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_that_loses_the_generator_is_caught_by_the_test_above(use_reentrant):
    """Without preserve_rng_state the gradients do not fit the output: what the test above would then see."""
    tensors, indices = draw(), packed()

    def function(q, k, v, rows):
        return flashmask_attention(q, k, v, rows, causal=True, dropout=0.4)

    paddle.seed(5)
    plain = run(function, tensors, indices)
    paddle.seed(5)
    recomputed = run(
        lambda q, k, v, rows: recompute(function, q, k, v, rows, use_reentrant=use_reentrant, preserve_rng_state=False),
        tensors,
        indices,
    )
    np.testing.assert_array_equal(recomputed[0], plain[0])
    assert np.abs(recomputed[1] - plain[1]).max() > 1e-2


def test_inside_pylayer():
    class Attention(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, q, k, v, indices):
            with paddle.enable_grad():
                leaves = [t.detach() for t in (q, k, v)]
                for leaf in leaves:
                    leaf.stop_gradient = False
                out = attention(*leaves, indices)
            ctx.save_for_backward(*leaves, out)
            return out.detach()

        @staticmethod
        def backward(ctx, dout):
            *leaves, out = ctx.saved_tensor()
            paddle.autograd.backward([out], [dout])
            return (*(leaf.grad for leaf in leaves), None)

    check(Attention.apply)


class Attention(paddle.nn.Layer):
    """A model that is the op and one parameter."""

    def __init__(self):
        super().__init__()
        self.gain = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(2.0))

    def forward(self, q, k, v, indices):
        return attention(q, k, v, indices) * self.gain


def test_jit_save_and_load(tmp_path):
    path = str(tmp_path / "model")
    paddle.jit.save(Attention(), path, input_spec=specs())
    loaded = paddle.jit.load(path)
    tensors, indices = draw(batch=1, seqlen_q=70, seqlen_k=70), documents(70, 13, 1)
    out, *grads = (2.0 * array for array in wanted_of(tensors, indices))

    loaded.eval()
    q, k, v = operands(tensors)
    assert_same([numpy_of(loaded(q, k, v, to_paddle(indices)))], [out], names=["out"])
    loaded.train()
    if PADDLE_3:  # a model loaded by 2.6 gives its inputs no gradients
        assert_same(run(loaded, tensors, indices), (out, *grads), names=("out", "dq", "dk", "dv"))


def run_program(tensors: Tensors, feed: dict, known: bool, **kwargs):
    """Builds and runs a static program; returns out, lse, dq, dk, dv."""
    paddle.enable_static()
    try:
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            for name, array in (("q", tensors.q), ("k", tensors.k), ("v", tensors.v), ("dout", tensors.dout)):
                feed = {**feed, name: array.astype(np.float32)}
            data = {}
            for name, array in feed.items():
                shape = list(array.shape) if known else [-1, -1, *array.shape[2:]]
                data[name] = paddle.static.data(name, shape, str(array.dtype))
            for name in "qkv":
                data[name].stop_gradient = False
            masks = {name: data[name] for name in ("startend_row_indices", "block_mask") if name in data}
            out, lse = flashmask_attention(data["q"], data["k"], data["v"], return_softmax_lse=True, **masks, **kwargs)
            grads = paddle.static.gradients([out], [data[n] for n in "qkv"], [data["dout"]])
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        return executor.run(main, feed=feed, fetch_list=[out, lse, *grads])
    finally:
        paddle.disable_static()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_static_program(known, masked):
    tensors, indices = draw(), packed()
    feed = {"startend_row_indices": indices} if masked else {}
    wanted = expected(tensors, visible_of(tensors, indices if masked else None, True))
    assert_same(run_program(tensors, feed, known, causal=True), wanted)


def test_static_program_with_block_mask():
    tensors = draw(seqlen_q=150, seqlen_k=140)
    block_mask = np.array([[1, 0], [1, 1]], np.int32) * np.ones((2, 4, 1, 1), np.int32)
    wanted = expected(tensors, visible_of(tensors, block_mask=block_mask))
    assert_same(run_program(tensors, {"block_mask": block_mask}, True), wanted)


def test_static_program_checks_sizes_when_it_runs():
    """Sizes unknown while the program was built: the op refuses what does not fit, and the process lives on."""
    tensors = draw()
    with pytest.raises(
        (ValueError, RuntimeError, OSError), match=r"startend_row_indices must have shape \[2, .*, 40, n\]"
    ):
        run_program(tensors, {"startend_row_indices": packed()[:1]}, False, causal=True)
    feed = {"startend_row_indices": packed()}
    wanted = expected(tensors, visible_of(tensors, packed(), True))
    assert_same(run_program(tensors, feed, False, causal=True), wanted)


def test_rng_name_is_refused_in_a_static_program():
    with pytest.raises(ValueError, match="rng_name: expected"):
        run_program(draw(), {}, True, dropout=0.5, rng_name="anything")


class Projected(paddle.nn.Layer):
    """A fused projection, the op and a loss."""

    def __init__(self):
        super().__init__()
        self.projection = paddle.nn.Linear(32, 3 * 32)

    def forward(self, x, indices):
        q, k, v = self.projection(x).reshape([0, 0, 2, 3 * 16]).chunk(3, axis=-1)
        return attention(q, k, v, indices).square().mean()


def test_in_a_trained_layer():
    """Two steps of an optimizer, dynamic and to_static, give the same parameters."""

    def train(transform):
        paddle.seed(0)
        model = Projected()
        optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
        step = transform(model)
        x = paddle.randn([2, 40, 32])
        for _ in range(2):
            loss = step(x, to_paddle(packed()))
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
        return float(loss), model.projection.weight.numpy()

    dynamic_loss, dynamic = train(lambda f: f)
    static_loss, static = train(lambda f: paddle.jit.to_static(f, full_graph=True))
    assert abs(dynamic_loss - static_loss) < 1e-6
    np.testing.assert_allclose(static, dynamic, rtol=0, atol=1e-6)
