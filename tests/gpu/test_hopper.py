"""What only concerns Hopper's own kernels: who takes which call, repeated runs, many masks at middling lengths.

Their results are tested with all others in test_kernels.py and test_large.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_tensors import Call, why_not
from reference import FORMS, random_intervals

if why_not():
    pytest.skip(str(why_not()), allow_module_level=True)

import torch
from problem import Problem

if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the device is not of compute capability 9.0", allow_module_level=True)


def inputs(s: int, h: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(s)
    return [torch.randn(1, s, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize(("d", "compiled"), [(8, 64), (64, 64), (72, 96), (96, 96), (128, 128), (192, 192), (256, 256)])
def test_forward_takes_its_own_kernels(d: int, compiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(64, 1, d)
    assert Call(q, k, v).kernel() == f"cuda sm90 d{compiled}"
    assert Call(q, k, v, dropout=0.1).kernel().startswith("cuda sm80")
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm80")
    assert Call(q, k, v).kernel().startswith("cuda sm80")


def test_what_tma_cannot_read_goes_to_the_portable_kernels() -> None:
    """A key head that is repeated by a stride of zero."""
    q, k, v = inputs(200, 4, 64)
    shared_k, shared_v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    call = Call(q, shared_k, shared_v, causal=True)
    assert call.kernel().startswith("cuda sm80")
    out, _ = call.forward()
    copied, _ = Call(q, shared_k.contiguous(), shared_v.contiguous(), causal=True).forward()
    torch.testing.assert_close(out, copied, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("d", [64, 128])
def test_backward_takes_its_own_kernels(d: int) -> None:
    call = Call(*inputs(64, 1, d))
    call.set_gradient(torch.randn_like(call.out))
    assert call.kernel(backward=True) == f"cuda sm90 d{d}"


def test_a_forced_architecture_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm70")
    q, k, v = inputs(64, 1, 64)
    with pytest.raises(NotImplementedError, match=r"FLASHMASK_FORCE_ARCH.*sm70"):
        Call(q, k, v).forward()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_thousand_runs_are_equal_to_the_bit(d: int) -> None:
    """A race shows as a moving result."""
    q, k, v = inputs(1500, 8, d)
    bounds = torch.from_numpy(random_intervals(np.random.default_rng(d), 1, 1, 1500, 1500, 4)).cuda()
    call = Call(q, k, v, bounds)
    first, first_lse = (x.clone() for x in call.forward())
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        call.out.fill_(float("nan"))
        out, lse = call.forward()
        differing += (out != first).any() | (lse != first_lse).any()
    assert differing.item() == 0


def long_call(d: int, window: int | None, s: int = 8192, **options: Any) -> Call:
    """So long, and on so many heads, that copies and stores wait for memory: what is too early by chance then shows."""
    q, k, v = inputs(s, (2048 << 13) // (d * s), d)
    bounds = None
    if window is not None:
        bounds = (torch.arange(s, device="cuda", dtype=torch.int32) + window).clamp(max=s).reshape(1, 1, s, 1)
    call = Call(q, k, v, bounds, causal=True, **options)
    call.set_gradient(torch.randn_like(call.out))
    call.forward()
    return call


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("window", [512, None])
def test_deterministic_gradients_are_equal_to_the_bit(d: int, window: int | None) -> None:
    call = long_call(d, window, deterministic=True)
    first = [x.clone() for x in call.backward()]
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(40):
        for gradient in call.gradients:
            gradient.fill_(float("nan"))
        call.workspace.fill_(0xFF)
        for gradient, expected in zip(call.backward(), first, strict=True):
            differing += (gradient != expected).any()
    assert differing.item() == 0


@pytest.mark.parametrize(
    ("d", "s"),
    # Up to 128 dims: with a window of 256, at 8K, the first dQ of a row tile is stored; else it is added to zeros.
    [(64, 8192), (128, 8192), (256, 8192), (64, 65536), (128, 32768)],
)
@pytest.mark.parametrize("window", [256, None])
def test_gradients_of_many_runs_are_those_of_the_portable_kernels(
    d: int, s: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits of the default mode change with the order of additions, so a race shows only against other kernels."""
    call = long_call(d, window, s)
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm80")
    expected = [x.float() for x in long_call(d, window, s, deterministic=True).backward()]
    monkeypatch.delenv("FLASHMASK_FORCE_ARCH")
    worst = torch.zeros((), device="cuda")
    for _ in range(10):
        for gradient in call.gradients:
            gradient.fill_(float("nan"))
        for gradient, other in zip(call.backward(), expected, strict=True):
            worst = torch.maximum(worst, (gradient.float() - other).abs().max() / other.abs().max())
    assert worst.item() < 0.02  # 0.006 as it should be; rows that were read too early were off by 0.1


@pytest.mark.parametrize("seed", range(200))
def test_fuzzed_masks(seed: int) -> None:
    rng = np.random.default_rng(7000 + seed)
    n, causal = FORMS[seed % len(FORMS)]
    s_q, s_k = (int(x) for x in rng.integers(1024, 4097, 2))
    options: dict[str, Any] = {"deterministic": bool(rng.integers(2))}
    Problem(
        b=1,
        s_q=s_q,
        s_k=s_q if rng.random() < 0.6 else s_k,
        h_q=2,
        h_k=int(rng.choice([1, 2])),
        d=int(rng.choice([64, 96, 128, 192, 256])),
        h_m=int(rng.choice([1, 2])),
        n=n,
        causal=causal,
        seed=seed,
        block_mask=bool(rng.random() < 0.2),
        options=options,
    ).run()
