"""The benchmark's masks: the twelve of the paper's Figure 1, with document lengths of the official kernel benchmark."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_flashmask import masks

WORKLOADS = Path(__file__).with_name("workloads.json")
MASKS = (
    "full",
    "causal",
    "sliding_window",
    "causal_document",
    "document",
    "share_question",
    "global_sliding_window",
    "causal_blockwise",
    "prefix_lm_causal",
    "prefix_lm_document",
    "qk_sparse",
    "random_eviction",
)


@dataclass(frozen=True)
class Case:
    """One mask at one size. Inputs follow from it alone, so that every rival sees the same numbers."""

    mask: str
    seqlen: int
    head_dim: int
    heads: int
    batch: int
    dtype: str
    first_sample: int = 0  # which of the document samples the first row of the batch takes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def indices(self) -> tuple[npt.NDArray[np.int32] | None, bool]:
        return _indices(self.mask, self.seqlen, self.batch, self.first_sample)

    def inputs(self) -> tuple[npt.NDArray[np.float32], ...]:
        """query, key, value and the gradient of the output, each `[batch, seqlen, heads, head_dim]` float32."""
        rng = np.random.default_rng(20241010)
        shape = (self.batch, self.seqlen, self.heads, self.head_dim)
        return tuple(rng.standard_normal(shape, dtype=np.float32) for _ in range(4))

    def operand_bytes(self) -> int:
        """Of query, or of any tensor of its shape, on a device (on a CPU operands may be converted)."""
        return self.batch * self.seqlen * self.heads * self.head_dim * (4 if self.dtype == "float32" else 2)

    def area(self) -> tuple[float, float]:
        """Shares of the score matrix: visible scores, and 128x128 tiles that are not fully masked."""
        indices, causal = self.indices()
        stats = masks.block_stats(indices, causal, self.seqlen)
        return stats.visible_fraction, stats.tile_fraction

    def forward_flops(self) -> float:
        """Of all scores, masked ones too: two products of 2 * head_dim each."""
        return 4.0 * self.seqlen**2 * self.head_dim * self.heads * self.batch


@functools.cache
def _samples(seqlen: int) -> list[dict[str, Any]]:
    """Five samples of documents `[prefix, length]` that fill `seqlen`; other lengths are scaled from the nearest."""
    known = {int(length): samples for length, samples in json.loads(WORKLOADS.read_text())["samples"].items()}
    if seqlen in known:
        return known[seqlen]
    nearest = min(known, key=lambda length: abs(length - seqlen))
    scaled = []
    for sample in known[nearest]:
        ends = np.round(np.cumsum([length for _, length in sample["documents"]]) * seqlen / nearest).astype(int)
        lengths = np.diff(ends, prepend=0).tolist()
        prefixes = [round(prefix * seqlen / nearest) for prefix, _ in sample["documents"]]
        scaled.append({"documents": list(zip(prefixes, lengths, strict=True)), "qk_sparse": sample["qk_sparse"]})
    return scaled


def documents(case: Case) -> list[list[int]]:
    """Document lengths of each row of the batch."""
    samples = _samples(case.seqlen)
    rows = [samples[(case.first_sample + i) % len(samples)] for i in range(case.batch)]
    return [[length for _, length in row["documents"]] for row in rows]


@functools.cache
def _indices(mask: str, seqlen: int, batch: int, first_sample: int) -> tuple[npt.NDArray[np.int32] | None, bool]:
    samples = _samples(seqlen)
    rows = [samples[(first_sample + i) % len(samples)] for i in range(batch)]
    lengths = [[length for _, length in row["documents"]] for row in rows]
    prefixes = [[prefix for prefix, _ in row["documents"]] for row in rows]
    whole = [seqlen] * batch
    builders = {
        "full": masks.full,
        "causal": masks.causal,
        "sliding_window": lambda: masks.sliding_window(whole, seqlen // 16),
        "causal_document": lambda: masks.causal_document(lengths),
        "document": lambda: masks.document(lengths),
        "share_question": lambda: masks.share_question([[row] for row in lengths]),
        "global_sliding_window": lambda: masks.global_sliding_window(whole, 16, seqlen // 16, seqlen // 16),
        "causal_blockwise": lambda: masks.causal_blockwise(lengths),
        "prefix_lm_causal": lambda: masks.prefix_lm_causal(whole, seqlen // 2),
        "prefix_lm_document": lambda: masks.prefix_lm_document(lengths, prefixes),
        "qk_sparse": lambda: masks.qk_sparse(lengths, [row["qk_sparse"] for row in rows]),
        "random_eviction": lambda: masks.random_eviction(whole, seed=0, start_row=seqlen // 2),
    }
    return builders[mask]()
