"""Long sequences, many rows in the batch, and tensors of more than 2^31 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_tensors import fused, why_not

if why_not():
    pytest.skip(str(why_not()), allow_module_level=True)

import dense
import torch

from paddle_flashmask import masks


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def lengths(rng: np.random.Generator, total: int, count: int) -> list[int]:
    ends = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
    return np.diff(ends, prepend=0, append=total).tolist()


def mask(name: str, s: int) -> tuple[Any, bool]:
    rng = np.random.default_rng(s)
    if name == "causal_document":
        indices, causal = masks.causal_document([lengths(rng, s, 12)])
    elif name == "document":
        indices, causal = masks.document([lengths(rng, s, 12)])
    elif name == "global_sliding_window":
        indices, causal = masks.global_sliding_window([s], 16, s // 16, s // 16)
    else:
        indices, causal = masks.random_eviction([s], seed=0)
    return torch.from_numpy(np.ascontiguousarray(indices)).cuda(), causal


@pytest.mark.parametrize(
    ("name", "s", "d"),
    [
        ("causal_document", 131072, 64),
        ("causal_document", 131072, 128),
        ("global_sliding_window", 131072, 128),
        ("document", 16383, 128),
        ("random_eviction", 16383, 64),
        ("random_eviction", 32768, 128),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_long(name: str, s: int, d: int, deterministic: bool) -> None:
    torch.manual_seed(0)
    q, k, v, dout = (draw(1, s, 1, d) for _ in range(4))
    bounds, causal = mask(name, s)
    got = fused(q, k, v, bounds, dout, causal=causal, deterministic=deterministic)
    want = dense.attention_by_rows(q, k, v, bounds, causal, d**-0.5, dout)
    for key, reference in want.items():
        error = (got[key].double() - reference).norm() / reference.norm()
        assert error < 1e-2, (key, error.item())
        # An error in a few rows would drown in the norm of all.
        rows = (got[key].double() - reference).flatten(1).abs().max().item()
        assert rows < 0.05 * reference.abs().max().item() + 0.02, (key, rows)


@pytest.mark.parametrize("n", [0, 1])
def test_many_small_sequences(n: int) -> None:
    """(batch, s_q, s_k, h_q, h_k) = (2840, 32, 32, 16, 4)."""
    torch.manual_seed(0)
    q, dout = draw(2840, 32, 16, 64), draw(2840, 32, 16, 64)
    k, v = draw(2840, 32, 4, 64), draw(2840, 32, 4, 64)
    bounds = torch.randint(0, 40, (2840, 4, 32, 1), device="cuda", dtype=torch.int32) if n else None
    got = fused(q, k, v, bounds, dout, causal=True)
    sees = dense.visible(bounds, True, 32, 32)
    want = dense.attention(q, k, v, sees, 0.125, dout=dout)
    naive = dense.attention(q, k, v, sees, 0.125, dout=dout, dtype=torch.bfloat16)
    dense.check(got, want, naive)


def test_more_than_two_to_the_31_elements() -> None:
    """The last head of a huge call equals the same head computed alone, to the bit."""
    s, h, d = 131072, 132, 128
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free device memory")
    torch.manual_seed(0)
    q, k, v, dout = (draw(1, s, h, d) for _ in range(4))
    assert q.numel() > 2**31
    bounds, causal = masks.sliding_window([s], 512)
    bounds = torch.from_numpy(np.ascontiguousarray(bounds)).cuda()
    got = fused(q, k, v, bounds, dout, causal=causal, deterministic=True)
    alone = [x[:, :, -1:] for x in (q, k, v, dout)]
    want = fused(*alone[:3], bounds, alone[3], causal=causal, deterministic=True)
    for key, value in want.items():
        last = got[key][:, -1:] if key == "lse" else got[key][:, :, -1:]
        assert torch.equal(last, value), key
