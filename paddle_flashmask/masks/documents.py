"""Masks of packed rows: several documents, or a question and its answers, share one row of the batch.

Every builder takes lengths per sample and returns `(startend_row_indices, causal)`, int32 `[b, 1, S, n]`. S is
`seqlen`, or the longest sample if that is None. What lies behind a sample's last document is padding: its keys are
hidden from all, and its queries see nothing where the form can say so.
The masks are those of figure 1 of "FlashMask: Efficient and Rich Mask Extension of FlashAttention" (arXiv 2410.01359).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arguments import Lengths, Row, integers, packed_rows, per_span, resolve_seqlen, sequence
from ._form import Mask, fully_masked


def causal_document(lengths: Sequence[Lengths], seqlen: int | None = None) -> Mask:
    """Packed documents, causal inside each: the mask of SFT on packed samples. n = 1, causal.

    Args:
        lengths: per sample the lengths of its documents, `[[3, 5], [8]]`.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: wrong nesting, or a length that is no integer.
        ValueError: no sample, no document, a length below 1, or a sample longer than `seqlen`.
    """
    rows, total = packed_rows(lengths, seqlen)
    indices = fully_masked(len(rows), 1, total, 1, True)
    for out, row in zip(indices[:, 0], rows, strict=True):
        out[: row.total, 0] = row.per_token(row.ends)
    return indices, True


def document(lengths: Sequence[Lengths], seqlen: int | None = None) -> Mask:
    """Packed documents, bidirectional inside each. n = 2, not causal. Arguments and errors as `causal_document`."""
    rows, total = packed_rows(lengths, seqlen)
    indices = fully_masked(len(rows), 1, total, 2, False)
    for out, row in zip(indices[:, 0], rows, strict=True):
        out[: row.total, 0] = row.per_token(row.ends)
        out[: row.total, 1] = row.per_token(row.starts)
    return indices, False


def prefix_lm_document(lengths: Sequence[Lengths], prefixes: Sequence[Lengths], seqlen: int | None = None) -> Mask:
    """Packed documents, each with a bidirectional prefix and a causal rest. n = 2, not causal.

    Args:
        lengths: per sample the lengths of its documents (prefix included), `[[6, 4], [10]]`.
        prefixes: per document the length of its prefix, nested as `lengths`, `[[2, 1], [5]]`; 0 is allowed.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError, ValueError: as `causal_document`; also if `prefixes` is not nested as `lengths`, or if a prefix is
            negative or longer than its document.
    """
    rows, total = packed_rows(lengths, seqlen)
    indices = fully_masked(len(rows), 1, total, 2, False)
    for i, prefix in enumerate(per_span("prefixes", prefixes, rows, "prefix lengths")):
        row, out = rows[i], indices[i, 0]
        too_long = prefix > row.lengths
        if too_long.any():
            k = int(too_long.argmax())
            raise ValueError(
                f"prefixes[{i}][{k}]: expected at most lengths[{i}][{k}] = {row.lengths[k]}, got {prefix[k]}"
            )
        token = np.arange(row.total)
        in_prefix = token < row.per_token(row.starts + prefix)
        out[: row.total, 0] = row.per_token(row.ends)
        out[: row.total, 1] = np.where(in_prefix, row.per_token(row.starts), token)
    return indices, False


def causal_blockwise(lengths: Sequence[Lengths], seqlen: int | None = None) -> Mask:
    """In-context blocks: each document sees itself, the last one sees all; causal throughout. n = 2, causal.

    Arguments and errors as `causal_document`. The form cannot hide from padding queries the keys of any document
    before the last but one; their outputs mean nothing, as those of padding always do.
    """
    rows, total = packed_rows(lengths, seqlen)
    indices = fully_masked(len(rows), 1, total, 2, True)
    for out, row in zip(indices[:, 0], rows, strict=True):
        start, end = row.ends.copy(), np.full(row.lengths.size, row.starts[-1])
        # Nothing lies between these two documents and the last one, so their interval is free to hide the padding.
        start[-2:], end[-2:] = row.total, total
        out[: row.total, 0] = row.per_token(start)
        out[: row.total, 1] = row.per_token(end)
    return indices, True


def share_question(lengths: Sequence[Sequence[Lengths]], seqlen: int | None = None) -> Mask:
    """One question and its answers: an answer sees the question and itself, causally (DPO, RM). n = 1, causal.

    Args:
        lengths: per sample a list of groups, each `[question, answer, answer, ...]`; several groups may be packed
            into one row: `[[[4, 2, 3], [5, 1, 1]], [[8, 2, 2]]]` is a batch of two rows.
        seqlen: row length S; None takes the longest sample.

    Raises:
        TypeError: wrong nesting, or a length that is no integer.
        ValueError: no sample, no group, a group without an answer, a length below 1, or a sample longer than `seqlen`.
    """
    samples = sequence("lengths", lengths, "samples, each a sequence of [question, answer, ...] groups")
    parsed = [_groups(f"lengths[{i}]", sample) for i, sample in enumerate(samples)]
    total = resolve_seqlen(seqlen, [row.total for row, _ in parsed])
    indices = fully_masked(len(parsed), 1, total, 1, True)
    for out, (row, sizes) in zip(indices[:, 0], parsed, strict=True):
        end = row.ends.copy()
        last = np.cumsum(sizes) - 1
        end[last - sizes + 1] = row.ends[last]  # a question is seen to the end of its group
        out[: row.total, 0] = row.per_token(end)
    return indices, True


def _groups(name: str, sample: Any) -> tuple[Row, npt.NDArray[np.int64]]:
    """The spans of one sample's groups, and how many spans each group has."""
    what = "[question, answer, ...] groups"
    groups = sequence(name, sample, what)
    for k, group in enumerate(groups):
        if len(sequence(f"{name}[{k}]", group, "lengths: the question, then its answers")) < 2:
            raise ValueError(f"{name}[{k}]: expected a question and at least one answer, got {group!r}")
    flat = list(chain.from_iterable(groups))
    try:
        spans = integers(name, flat, "lengths", 1)
    except (TypeError, ValueError):
        for k, group in enumerate(groups):  # names the group
            integers(f"{name}[{k}]", group, "lengths", 1)
        raise
    return Row(spans), np.fromiter(map(len, groups), np.int64, len(groups))
