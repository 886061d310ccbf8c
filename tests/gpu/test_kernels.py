"""The CUDA kernels against dense float64 attention: every mask form, head layout, length, head dim and option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_tensors import Call, architectures, fused, why_not
from reference import FORMS, random_intervals

if why_not():
    pytest.skip(str(why_not()), allow_module_level=True)

import torch
from problem import DTYPES, Problem


@pytest.fixture(params=architectures(), autouse=True)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels that the device takes by default, and the portable ones where it has others."""
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "" if request.param == "default" else request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), *FORMS])
def test_forms_and_head_dims(n: int, causal: bool, d: int, dtype: str) -> None:
    Problem(n=n, causal=causal, d=d, dtype=dtype, s_q=399, s_k=399, h_m=2 if n else 1).run()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(("n", "causal"), [(0, False), (1, True), (4, False)])
def test_kernels_of_smaller_gpus(n: int, causal: bool, d: int, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes for 99 KiB of shared memory a block (RTX 30 and 40)."""
    monkeypatch.setenv("FLASHMASK_CUDA_SHARED_LIMIT", str(99 * 1024))
    options = {"deterministic": d % 64 == 0, "dropout": dropout, "seed": 3}
    Problem(n=n, causal=causal, d=d, s_q=399, s_k=450, h_q=4, options=options).run()


@pytest.mark.parametrize("s", [1, 2, 63, 64, 65, 113, 127, 128, 129, 239, 799, 1023])
@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), (1, True), (4, False)])
def test_lengths(s: int, n: int, causal: bool) -> None:
    Problem(s_q=s, s_k=s, n=n, causal=causal, b=1, seed=s).run()


@pytest.mark.parametrize(("s_q", "s_k"), [(1, 513), (100, 300), (300, 100), (513, 1), (129, 1025), (640, 64)])
@pytest.mark.parametrize(("n", "causal"), [(0, True), (1, True), (2, True), (2, False), (4, False)])
def test_unequal_lengths(s_q: int, s_k: int, n: int, causal: bool) -> None:
    Problem(s_q=s_q, s_k=s_k, n=n, causal=causal, d=64).run()


@pytest.mark.parametrize(("h_q", "h_k"), [(4, 4), (4, 2), (6, 1), (8, 2)])
@pytest.mark.parametrize("mask_heads", ["one", "key", "query"])
@pytest.mark.parametrize("d", [64, 128])
def test_head_layouts(h_q: int, h_k: int, mask_heads: str, d: int) -> None:
    h_m = {"one": 1, "key": h_k, "query": h_q}[mask_heads]
    Problem(h_q=h_q, h_k=h_k, h_m=h_m, n=2, causal=True, s_q=300, s_k=300, d=d).run()


@pytest.mark.parametrize(
    ("d", "d_v"), [(8, 8), (40, 40), (72, 72), (80, 80), (104, 64), (64, 128), (192, 128), (8, 256)]
)
def test_padded_head_dims(d: int, d_v: int) -> None:
    Problem(d=d, d_v=d_v, n=1, causal=True).run()


@pytest.mark.parametrize("scale", [0.5, -0.1, 0.0, 1e-3])
@pytest.mark.parametrize("n", [0, 2])
def test_scale(scale: float, n: int) -> None:
    Problem(n=n, causal=True, options={"scale": scale}, d=64).run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 72, 128, 192, 256])
@pytest.mark.parametrize("growth", [4.0, 20.0, 150.0])
@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), (2, True), (4, False)])
def test_scores_that_outgrow_the_first_tile(n: int, causal: bool, growth: float, d: int, dtype: str) -> None:
    """Weights of up to 2^15, 2^80, 2^600 if the first tile's largest were 1; on Hopper a row's reference moves."""
    mask: dict[str, Any] = {"n": n, "causal": causal, "h_m": 2 if n else 1}
    options = {"scale": -(d**-0.5)} if causal else {}
    errors = Problem(**mask, growth=growth, d=d, dtype=dtype, s_q=500, s_k=700, h_q=4, options=options).run()
    # Rounding such scores to 16 bits, as the measure of run() does, leaves little of them; ours are not rounded.
    assert errors["out"] < 5e-3
    assert errors["lse"] < 1e-5


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
def test_dropout(dropout: float, d: int) -> None:
    options = {"dropout": dropout, "seed": 2**40 + 17, "offset": 2**33 + 5}
    Problem(n=1, causal=True, d=d, h_q=4, h_k=2, options=options).run()


@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), *FORMS])
@pytest.mark.parametrize("d", [64, 256])
def test_block_mask(n: int, causal: bool, d: int) -> None:
    Problem(n=n, causal=causal, block_mask=True, s_q=700, s_k=900, h_m=2, d=d).run()


@pytest.mark.parametrize(("n", "causal"), [(0, False), (0, True), *FORMS])
@pytest.mark.parametrize("d", [64, 128])
def test_deterministic_is_right(n: int, causal: bool, d: int) -> None:
    Problem(n=n, causal=causal, s_q=1100, s_k=1100, h_q=4, d=d, options={"deterministic": True}).run()


def _inputs(s: int, h: int, d: int, h_k: int | None = None) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(s)
    heads = (h, h_k or h, h_k or h, h)
    return tuple(torch.randn(2, s, heads[i], d, device="cuda", dtype=torch.bfloat16) for i in range(4))


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("block_mask", [False, True])
def test_deterministic_repeats_bitwise_and_skipping_changes_nothing(n: int, block_mask: bool) -> None:
    s = 2500
    q, k, v, dout = _inputs(s, 4, 128, 2)
    rng = np.random.default_rng(5)
    bounds = torch.from_numpy(random_intervals(rng, 2, 1, s, s, 1)).cuda() if n else None
    blocks = torch.from_numpy((rng.random((2, 1, 20, 20)) < 0.5).astype(np.int32)).cuda() if block_mask else None
    runs = [
        fused(q, k, v, bounds, dout, causal=True, block_mask=blocks, deterministic=True, no_skip=no_skip)
        for no_skip in (False, False, False, True)
    ]
    for name, first in runs[0].items():
        for number, other in enumerate(runs[1:]):
            assert torch.equal(first, other[name]), f"{name}: run {number + 1} differs"


def test_strided_operands() -> None:
    """q, k, v as parts of one packed tensor, heads before rows."""
    torch.manual_seed(3)
    packed = torch.randn(2, 3, 2, 200, 64, device="cuda", dtype=torch.bfloat16)  # [b, 3, h, s, d]
    q, k, v = (packed[:, i].transpose(1, 2) for i in range(3))
    dout = torch.randn(2, 200, 2, 64, device="cuda", dtype=torch.bfloat16)
    strided = fused(q, k, v, None, dout, causal=True, deterministic=True)
    contiguous = fused(q.contiguous(), k.contiguous(), v.contiguous(), None, dout, causal=True, deterministic=True)
    for name, value in contiguous.items():
        assert torch.equal(value, strided[name]), name


def test_misaligned_operand_is_refused() -> None:
    q, _, v, _ = _inputs(64, 2, 64)
    shifted = torch.randn(2 * 64 * 2 * 64 + 1, device="cuda").to(torch.bfloat16)[1:].view(2, 64, 2, 64)
    with pytest.raises(ValueError, match="k: the address"):
        Call(q, shifted, v).forward()


def test_float32_is_refused() -> None:
    q, k, v, _ = (x.float() for x in _inputs(64, 2, 64))
    with pytest.raises(NotImplementedError, match="float32"):
        Call(q, k, v).forward()


def test_cuda_graph() -> None:
    """Forward and backward can be captured: nothing waits for the device, and the seed is read there."""
    q, k, v, dout = _inputs(512, 2, 64)
    bounds = torch.from_numpy(random_intervals(np.random.default_rng(1), 2, 1, 512, 512, 1)).cuda()
    call = Call(q, k, v, bounds, causal=True, deterministic=True, dropout=0.2, seed=1)
    call.set_gradient(dout)
    call._prepare(max(call._forward_bytes, call._backward_bytes))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.forward()
        call.backward()
    for seed in (1, 2):
        call.seed_offset[0] = seed
        q.normal_()
        graph.replay()
        fresh = fused(q, k, v, bounds, dout, causal=True, deterministic=True, dropout=0.2, seed=seed)
        for name, value in zip(("out", "dq", "dk", "dv"), (call.out, *call.gradients), strict=True):
            assert torch.equal(value, fresh[name]), (seed, name)


@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    n, causal = ((0, False), (0, True), *FORMS)[rng.integers(6)]
    h_k = int(rng.choice([1, 2, 3]))
    h_q = h_k * int(rng.choice([1, 2, 4]))
    d = int(rng.integers(1, 33)) * 8
    options: dict[str, Any] = {"deterministic": bool(rng.integers(2))}
    if rng.random() < 0.3:
        options.update(dropout=float(rng.choice([0.1, 0.7])))
        options.update(seed=int(rng.integers(2**62)), offset=int(rng.integers(99)))
    Problem(
        b=int(rng.integers(1, 3)),
        s_q=int(rng.integers(1, 700)),
        s_k=int(rng.integers(1, 700)),
        h_q=h_q,
        h_k=h_k,
        d=d,
        d_v=d if rng.random() < 0.6 else int(rng.integers(1, 33)) * 8,
        h_m=int(rng.choice([1, h_k, h_q])) if n else 1,
        n=n,
        causal=causal,
        dtype=str(rng.choice(["bf16", "fp16"])),
        seed=seed,
        block_mask=bool(rng.random() < 0.2),
        options=options,
    ).run()


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_later_tile_reaches_its_rows_only(value: float, d: int) -> None:
    """Beside rows whose scores grow beyond float32's exponentials, which are computed again."""
    torch.manual_seed(d)
    q, k, v = (torch.randn(1, 700, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k *= 1 + 150 * torch.linspace(0, 1, 700, device="cuda", dtype=torch.bfloat16)[:, None, None] ** 2
    k[0, 600, 0] = value
    out, lse = Call(q, k, v, causal=True).forward()
    assert torch.isfinite(out[:, :600]).all()
    assert torch.isfinite(out[:, :, 1]).all()
    assert torch.isfinite(lse[:, 1]).all()
    assert torch.isnan(out[:, 600:, 0]).all()


@pytest.mark.parametrize("d", [64, 128])
def test_nan_in_a_visible_key_reaches_the_output(d: int) -> None:
    """Hiding it would hide a diverged model; spreading it to rows that do not see the key would be a leak."""
    q, k, v = (torch.randn(1, 300, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[0, 5] = float("nan")
    out, lse = Call(q, k, v, causal=True).forward()
    assert torch.isfinite(out[:, :5]).all()
    assert torch.isnan(out[:, 5:]).all()
    assert torch.isnan(lse[:, :, 5:]).all()
