"""One attention problem: random operands, the core's results, the reference's, and what error is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference

from paddle_flashmask import _core, masks

NAMES = ("out", "lse", "dq", "dk", "dv")
STORE = {"float32": np.float32, "float16": np.float16, "bfloat16": _core.to_bf16}


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to what `dtype` can hold."""
    if dtype == "bfloat16":
        return _core.from_bf16(_core.to_bf16(array))
    return np.asarray(array, np.float32).astype(dtype).astype(np.float32)


def loaded(array: np.ndarray) -> np.ndarray:
    return _core.from_bf16(array) if array.dtype == np.uint16 else np.asarray(array, np.float32)


@dataclass
class AttentionCase:
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    bounds: np.ndarray | None = None
    causal: bool = False
    dtype: str = "float32"
    scale: float | None = None
    block_mask: np.ndarray | None = None
    dropout: float = 0.0
    seed: int = 1234
    offset: int = 5678
    rng_seed: int = 0
    operands: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.rng_seed)
        head_dim_v = self.head_dim_v or self.head_dim
        shapes = (
            (self.batch, self.seqlen_q, self.heads_q, self.head_dim),
            (self.batch, self.seqlen_k, self.heads_k, self.head_dim),
            (self.batch, self.seqlen_k, self.heads_k, head_dim_v),
            (self.batch, self.seqlen_q, self.heads_q, head_dim_v),
        )
        self.operands = tuple(rounded(rng.standard_normal(shape, dtype=np.float32), self.dtype) for shape in shapes)

    @property
    def true_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def arguments(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "scale": self.scale,
            "dropout": self.dropout,
            "seed": self.seed,
            "offset": self.offset,
            "block_mask": self.block_mask,
        }

    def stored(self) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(STORE[self.dtype](operand)) for operand in self.operands)

    def run(self, **options: Any) -> dict[str, np.ndarray]:
        """The core's results in storage types."""
        query, key, value, dout = self.stored()
        out, lse = _core.forward(query, key, value, self.bounds, **self.arguments(), **options)
        gradients = _core.backward(query, key, value, out, lse, dout, self.bounds, **self.arguments(), **options)
        return dict(zip(NAMES, (out, lse, *gradients), strict=True))

    def visible(self) -> np.ndarray:
        return masks.to_dense(self.bounds, self.causal, self.seqlen_q, self.seqlen_k, block_mask=self.block_mask)

    def dropout_keep(self) -> dict[str, Any]:
        if self.dropout == 0.0:
            return {}
        keep, factor = reference.dropout_keep(
            self.dropout, self.seed, self.offset, self.batch, self.heads_q, self.seqlen_q, self.seqlen_k
        )
        return {"keep": keep, "keep_scale": factor}

    def expected(self) -> dict[str, np.ndarray]:
        """float64."""
        query, key, value, dout = self.operands
        visible = np.broadcast_to(self.visible(), (self.batch, *self.visible().shape[1:]))
        kept = self.dropout_keep()
        out, lse = reference.attention(query, key, value, visible, self.true_scale, **kept)
        gradients = reference.attention_grads(query, key, value, visible, self.true_scale, dout, **kept)
        return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def assert_close(
    case: AttentionCase, results: dict[str, np.ndarray], expected: dict[str, np.ndarray] | None = None
) -> None:
    """float32 results against float64 ones: within rounding of the largest magnitude that enters a sum."""
    for name, want in (expected or case.expected()).items():
        got = loaded(results[name]).astype(np.float64)
        assert got.shape == want.shape, name
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=name)
        finite = np.isfinite(want)
        assert np.isfinite(got[finite]).all(), name
        tolerance = 1e-5 * (1.0 + np.abs(want[finite]).max(initial=0.0))
        worst = np.abs(got[finite] - want[finite]).max(initial=0.0)
        assert worst <= tolerance, f"{name}: off by {worst}, allowed {tolerance}"


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
