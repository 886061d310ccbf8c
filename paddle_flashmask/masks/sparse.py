"""Sparse causal masks: dropped tokens, hash buckets, evicted keys.

The builders return `(startend_row_indices, causal)`, int32 `[b, h_m, S, n]`; padding as in documents.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._arguments import (
    Lengths,
    Row,
    integer,
    integers,
    packed_rows,
    per_span,
    resolve_seqlen,
    sample_lengths,
    sequence,
    shown,
)
from ._form import Mask, fully_masked


def qk_sparse(lengths: Sequence[Lengths], flags: Sequence[Sequence[int | bool]], seqlen: int | None = None) -> Mask:
    """Causal with dropped tokens: a key of a flagged span is hidden from that span's queries. n = 2, causal.

    Queries behind the span still see its keys. The form cannot hide from padding queries the keys of a flagged span
    unless it is the last span of its sample.

    Args:
        lengths: per sample the lengths of the spans that tile it, `[[100, 20, 30], [150]]`.
        flags: per span 1 (or True) if its keys are dropped, nested as `lengths`, `[[0, 1, 0], [0]]`.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: wrong nesting, or a value that is no integer.
        ValueError: no sample, no span, a length below 1, a flag other than 0 and 1, or a sample longer than `seqlen`.
    """
    rows, total = packed_rows(lengths, seqlen, "span lengths")
    indices = fully_masked(len(rows), 1, total, 2, True)
    for i, flag in enumerate(per_span("flags", flags, rows, "flags", booleans=True)):
        if (flag > 1).any():
            k = int((flag > 1).argmax())
            raise ValueError(f"flags[{i}][{k}]: expected 0 or 1, got {flag[k]}")
        row, out = rows[i], indices[i, 0]
        ends = row.ends.copy()
        ends[-1] = total  # the padding queries follow the last span, so its interval can hide them too
        dropped = row.per_token(flag.astype(bool))
        out[: row.total, 0] = np.where(dropped, np.arange(row.total), row.total)
        out[: row.total, 1] = np.where(dropped, row.per_token(ends), total)
    return indices, True


def hash_sparse(
    lengths: Sequence[Lengths] | Sequence[Sequence[Lengths]], seqlen: int | None = None, heads: int | None = None
) -> Mask:
    """Tokens sorted by hash bucket: a query sees the keys of its own bucket, causally. n = 2, causal.

    Args:
        lengths: per sample the number of tokens in each bucket, `[[5, 0, 3], [8]]`; a bucket may be empty. With
            `heads` there is one such list a head, `[[[5, 0, 3], [4, 4]], ...]`: each head hashes for itself.
        seqlen: row length S; None takes the longest sample.
        heads: number of mask heads h_m; None is one head for all.

    Raises:
        TypeError: wrong nesting, or a length that is no integer.
        ValueError: no sample, no bucket, a negative length, a sample without tokens, a wrong number of heads, heads
            of one sample that hold different numbers of tokens, or a sample longer than `seqlen`.
    """
    what = "bucket lengths"
    if heads is None:
        rows, total = packed_rows(lengths, seqlen, what, minimum=0)
        by_sample = [[row] for row in rows]
    else:
        heads = integer("heads", heads, 1)
        samples = sequence("lengths", lengths, f"samples, each a sequence of heads with their {what}")
        by_sample = [_bucket_heads(f"lengths[{i}]", sample, heads, what) for i, sample in enumerate(samples)]
        total = resolve_seqlen(seqlen, [sample[0].total for sample in by_sample])
    indices = fully_masked(len(by_sample), len(by_sample[0]), total, 2, True)
    for i, sample in enumerate(by_sample):
        if sample[0].total == 0:
            raise ValueError(f"lengths[{i}]: expected at least one token, got only empty buckets")
        for out, row in zip(indices[i], sample, strict=True):
            out[: row.total, 0] = row.per_token(row.ends)
    return indices, True


def _bucket_heads(name: str, sample: Any, heads: int, what: str) -> list[Row]:
    """The buckets of each head of one sample."""
    per_head = sequence(name, sample, f"heads, each a sequence of {what}")
    if len(per_head) != heads:
        raise ValueError(f"{name}: expected heads = {heads} sequences of {what}, got {len(per_head)}")
    rows = [Row(integers(f"{name}[{h}]", buckets, what, 0)) for h, buckets in enumerate(per_head)]
    for h, row in enumerate(rows):
        if row.total != rows[0].total:
            raise ValueError(f"{name}[{h}]: expected a sum of {rows[0].total} as in {name}[0], got {row.total}")
    return rows


def random_eviction(
    lengths: int | Lengths,
    seed: int,
    heads: int = 1,
    *,
    start_row: int = 0,
    fraction: float = 0.5,
    seqlen: int | None = None,
) -> Mask:
    """Causal with keys evicted at random: from some row on, nobody sees them (KV cache eviction). n = 1, causal.

    Each key is evicted with probability `fraction`, at a row drawn evenly from those behind it (and not before
    `start_row`). The same seed, `heads` and lengths give the same mask on every machine.

    Args:
        lengths: length of each sample; an integer is one sample.
        seed: of the random numbers, at least 0.
        heads: number of mask heads h_m, each with its own evictions.
        start_row: no key is evicted before this row.
        fraction: probability that a key is evicted at all, in [0, 1].
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: no sample, a length below 1, a negative seed or row, a fraction outside [0, 1], or a sample longer
            than `seqlen`.
    """
    totals, seqlen = sample_lengths(lengths, seqlen)
    seed, heads = integer("seed", seed, 0, 2**63 - 1), integer("heads", heads, 1)
    start_row = integer("start_row", start_row, 0)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.integer | np.floating):
        raise TypeError(f"fraction: expected a number, got {shown(fraction)}")
    if not math.isfinite(fraction) or not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    indices = fully_masked(len(totals), heads, seqlen, 1, True)
    for i, total in enumerate(totals):
        rng = np.random.default_rng((seed, i))  # a sample's mask does not depend on its neighbours' lengths
        earliest = np.maximum(np.arange(total) + 1, start_row)
        rows_left = np.maximum(total - earliest, 0)
        evicted = rng.random((heads, total)) < fraction
        row = earliest + (rng.random((heads, total)) * rows_left).astype(np.int64)
        indices[i, :, :total, 0] = np.where(evicted & (rows_left > 0), row, total)
    return indices, True
