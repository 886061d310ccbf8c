"""Packing for supervised fine-tuning (SFT): many samples in one row, none of which sees another.

A row of packed samples is masked by one row index per token, the end of its sample (the `causal_document` mask). The
same batches can be made with a dense mask of O(length^2) instead, as PaddleNLP's zero padding does, for comparison.
"""

from __future__ import annotations

import bisect
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import paddle

from ._common import (
    integers,
    refuse_dropped_mask,
    require_choice,
    require_keys,
    require_pad_token,
    require_positive,
    require_unicode,
    spread,
    token_array,
    token_ids,
)

__all__ = ["IGNORE", "PackedDataset", "PackingCollator", "encode_pair", "pack_lengths"]

logger = logging.getLogger(__name__)

IGNORE = -100
"""Label of a token that is not learned: the default ``ignore_index`` of PaddleNLP's criteria."""

STRATEGIES = ("greedy", "in_order")


def _turns(name: str, text: str | Sequence[str]) -> list[str]:
    turns = [text] if isinstance(text, str) else text
    if not isinstance(turns, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, got {type(text).__name__}")
    for turn in turns:
        if not isinstance(turn, str):
            raise TypeError(f"{name} must be a string or a list of strings, got a list with {type(turn).__name__}")
        require_unicode(name, turn)
    return list(turns)


def encode_pair(tokenizer: Any, source: str | Sequence[str], target: str | Sequence[str]) -> dict[str, list[int]]:
    """Tokens and labels of one SFT sample, shifted as PaddleNLP's trainers expect.

    PaddleNLP's criteria compare ``logits[i]`` with ``labels[i]``, so ``labels`` are the next tokens: the sequence
    ``prompt + answer + eos`` gives ``input_ids`` without its last token and ``labels`` without its first, with the
    prompt's labels set to -100. Nothing is truncated; ``PackedDataset`` refuses or skips samples that are too long.

    Args:
        tokenizer: a PaddleNLP (or transformers) tokenizer with an ``eos_token_id``.
        source: the prompt, or the user's turns of a conversation.
        target: the answer, or the answers to those turns (as many). Each is learned, with an eos after it.

    Returns:
        ``{"input_ids": [...], "labels": [...]}`` of equal length.

    Raises:
        TypeError: a turn is not a string.
        ValueError: numbers of turns differ, no turn, an empty answer, a lone surrogate in a turn, or a tokenizer
            without eos.
    """
    sources, targets = _turns("source", source), _turns("target", target)
    if not sources or len(sources) != len(targets):
        raise ValueError(
            f"source and target must have equally many turns, at least 1; got {len(sources)} and {len(targets)}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token: without it the model never learns to stop")

    tokens: list[int] = []
    learned: list[int] = []
    for number, (asked, answered) in enumerate(zip(sources, targets, strict=True)):
        prompt = token_ids(tokenizer, asked, add_special_tokens=number == 0)
        answer = token_ids(tokenizer, answered, add_special_tokens=False)
        if not answer:
            raise ValueError(f"target must not be empty, got {answered!r} in turn {number}")
        answer.append(tokenizer.eos_token_id)
        tokens += prompt + answer
        learned += [IGNORE] * len(prompt) + answer
    return {"input_ids": tokens[:-1], "labels": learned[1:]}


def pack_lengths(
    lengths: Sequence[int], max_length: int, strategy: Literal["greedy", "in_order"] = "greedy"
) -> list[list[int]]:
    """Distribute samples over rows of at most ``max_length`` tokens.

    Args:
        lengths: tokens of each sample, each from 1 to ``max_length``.
        max_length: tokens of a row.
        strategy: ``in_order`` closes a row when the next sample does not fit. ``greedy`` (best fit) keeps all rows open
            and puts each sample into the fullest one that still holds it, which fills rows better; short and long
            samples stay mixed, because they are not sorted.

    Returns:
        For each row the indices of its samples. Every index appears once.

    Raises:
        TypeError: ``lengths`` is not a list of integers, or ``max_length`` none.
        ValueError: ``max_length``, ``strategy`` or a length is out of range.
    """
    max_length = require_positive("max_length", max_length)
    require_choice("strategy", strategy, STRATEGIES)
    sizes = integers("lengths", lengths)
    if sizes.size and (sizes.min() < 1 or sizes.max() > max_length):
        worst = int(np.argmax((sizes < 1) | (sizes > max_length)))
        raise ValueError(f"lengths must be from 1 to max_length={max_length}, got lengths[{worst}]={sizes[worst]}")

    rows: list[list[int]] = []
    if strategy == "in_order":
        used = max_length
        for index, size in enumerate(sizes.tolist()):
            if used + size > max_length:
                rows.append([])
                used = 0
            rows[-1].append(index)
            used += size
        return rows

    room: list[tuple[int, int]] = []  # (tokens left, row), ascending: the first that fits is the fullest row
    for index, size in enumerate(sizes.tolist()):
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > size:
            bisect.insort(room, (left - size, row))
    return rows


@dataclass(frozen=True)
class PackingStats:
    """What packing did; ``print`` it before training.

    Attributes:
        samples: samples packed.
        skipped: samples left out because they were longer than a row.
        sample_lengths: shortest, median and longest packed sample, in tokens.
        rows: rows made.
        max_length: tokens of a row.
        tokens: tokens of all packed samples.
        fill: tokens over the rows' capacity, from 0 to 1.
        attended: share of a row's ``max_length**2`` scores that the mask lets through, from 0 to 1, averaged over rows.
    """

    samples: int
    skipped: int
    sample_lengths: tuple[int, int, int]
    rows: int
    max_length: int
    tokens: int
    fill: float
    attended: float

    def __str__(self) -> str:
        skipped = f" ({self.skipped:,} were too long)" if self.skipped else ""
        return (
            f"{self.samples:,} samples{skipped}; tokens shortest/median/longest: "
            f"{'/'.join(map(str, self.sample_lengths))}\n"
            f"{self.rows:,} rows of {self.max_length:,} tokens, {self.fill:.1%} filled; "
            f"the mask skips {1 - self.attended:.1%} of the scores"
        )


class PackedDataset(paddle.io.Dataset):
    """Packed rows as a map dataset for PaddleNLP's trainers; ``PackingCollator`` makes batches of them.

    Args:
        samples: ``{"input_ids": [...], "labels": [...]}`` each, labels shifted already (see ``encode_pair``).
        max_length: tokens of a row.
        strategy: ``greedy`` or ``in_order``, see ``pack_lengths``.
        too_long: what to do with a sample longer than a row: ``error``, or ``skip`` and log how many. None is
            truncated.

    Raises:
        TypeError: a sample is not a mapping with integers.
        ValueError: a sample without tokens, with what is no token id, with labels of another length, with nothing to
            learn, or too long; no sample at all. The message names the sample's index.
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Sequence[int]]],
        max_length: int,
        strategy: Literal["greedy", "in_order"] = "greedy",
        too_long: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        self.max_length = require_positive("max_length", max_length)
        # Before the samples are read: making them may take long.
        require_choice("strategy", strategy, STRATEGIES)
        require_choice("too_long", too_long, ("error", "skip"))
        self._samples: list[tuple[np.ndarray, np.ndarray]] = []
        self.skipped = 0
        longest = 0
        for index, sample in enumerate(samples):
            tokens, labels = _checked_sample(index, sample)
            if len(tokens) <= self.max_length:
                self._samples.append((tokens, labels))
                continue
            if too_long == "error":
                raise ValueError(
                    f"samples[{index}] has {len(tokens)} tokens, more than max_length={self.max_length}. Raise "
                    'max_length, shorten the sample, or leave such samples out with too_long="skip"'
                )
            self.skipped += 1
            longest = max(longest, len(tokens))
        if self.skipped:
            logger.warning(
                "skipped %d of %d samples: longer than max_length=%d (the longest has %d tokens)",
                self.skipped,
                self.skipped + len(self._samples),
                self.max_length,
                longest,
            )
        if not self._samples:
            raise ValueError(f"samples must hold at least one sample of 1 to {self.max_length} tokens, got none")
        self.rows = pack_lengths([len(tokens) for tokens, _ in self._samples], self.max_length, strategy)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest_sample(self) -> int:
        """Positions that a model needs, in tokens."""
        return max(len(tokens) for tokens, _ in self._samples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: int64 ``input_ids``, ``labels`` and ``position_ids`` (from 0 in each sample) ``[tokens]``, and
        ``lengths`` ``[samples]``."""
        parts = [self._samples[sample] for sample in self.rows[index]]
        lengths = np.array([len(tokens) for tokens, _ in parts], dtype=np.int64)
        return {
            "input_ids": np.concatenate([tokens for tokens, _ in parts]),
            "labels": np.concatenate([labels for _, labels in parts]),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "lengths": lengths,
        }

    def stats(self) -> PackingStats:
        """How well the rows are filled and how much of the attention the mask leaves."""
        sizes = np.array([len(tokens) for tokens, _ in self._samples], dtype=np.float64)
        capacity = len(self.rows) * self.max_length
        return PackingStats(
            samples=len(sizes),
            skipped=self.skipped,
            sample_lengths=spread(sizes),
            rows=len(self.rows),
            max_length=self.max_length,
            tokens=int(sizes.sum()),
            fill=float(sizes.sum() / capacity),
            attended=float((sizes * (sizes + 1) / 2).sum() / (capacity * self.max_length)),
        )


def _checked_sample(index: int, sample: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(sample, Mapping) or not {"input_ids", "labels"} <= set(sample):
        got = sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
        raise TypeError(f"samples[{index}] must be a mapping with input_ids and labels, got {got}")
    tokens = token_array(f"samples[{index}]['input_ids']", sample["input_ids"])
    labels = token_array(f"samples[{index}]['labels']", sample["labels"], ignored=IGNORE)
    if len(tokens) == 0:
        raise ValueError(f"samples[{index}] has no tokens")
    if len(labels) != len(tokens):
        raise ValueError(f"samples[{index}] must have as many labels as input_ids, got {len(labels)} and {len(tokens)}")
    if (labels == IGNORE).all():
        raise ValueError(f"samples[{index}] has nothing to learn: all labels are {IGNORE}")
    return tokens, labels


class PackingCollator:
    """Batches of packed rows, padded to ``max_length``, for PaddleNLP's trainers.

    Gives int64 ``input_ids``, ``labels``, ``position_ids`` ``[b, max_length]`` and one mask:

    - ``flashmask``: int32 ``attn_mask_startend_row_indices`` ``[b, 1, max_length]``, the end of each token's sample;
    - ``dense``: bool ``attention_mask`` ``[b, 1, max_length, max_length]``, True where row i sees column j.

    Padding is hidden from every row and sees nothing. Both masks come from the same rows, so two runs that differ in
    ``mask`` only see the same batches.

    Args:
        max_length: tokens of a row.
        pad_token_id: token of the padding, which is masked: any will do, ``eos`` too.
        mask: ``flashmask`` or ``dense``.

    Raises:
        TypeError, ValueError: an argument is out of range, or ``mask`` is ``dense`` where the environment has
            ``USE_CASUAL_MASK=True``: PaddleNLP would ignore the mask.
    """

    def __init__(
        self, max_length: int, pad_token_id: int = 0, mask: Literal["flashmask", "dense"] = "flashmask"
    ) -> None:
        self.max_length = require_positive("max_length", max_length)
        self.pad_token_id = require_pad_token(pad_token_id)
        require_choice("mask", mask, ("flashmask", "dense"))
        refuse_dropped_mask(mask)
        self.mask = mask

    def __call__(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Collate rows of a ``PackedDataset``.

        Raises:
            TypeError: a row lacks what a ``PackedDataset`` puts into it, or has something else than integers there.
            ValueError: no row, or a row longer than ``max_length``, or one whose parts differ in length: labels beyond
                the samples' ``lengths`` would be learned from hidden tokens.
        """
        if len(rows) == 0:
            raise ValueError("rows must hold at least one row, got none")
        shape = (len(rows), self.max_length)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }
        lengths = []
        for index, row in enumerate(rows):
            require_keys(index, row, (*batch, "lengths"), "PackedDataset")
            parts = {key: integers(f"rows[{index}][{key!r}]", row[key]) for key in (*batch, "lengths")}
            sizes = parts.pop("lengths").astype(np.int64)
            used = len(parts["input_ids"])
            if used > self.max_length:
                raise ValueError(f"rows[{index}] has {used} tokens, more than max_length={self.max_length}")
            if (sizes < 1).any() or sizes.sum() != used:
                raise ValueError(
                    f"rows[{index}]['lengths'] must be at least 1 each and add up to the row's {used} tokens, got "
                    f"{reprlib.repr(sizes.tolist())}, in all {sizes.sum()}"
                )
            for key, part in parts.items():
                if len(part) != used:
                    raise ValueError(
                        f"rows[{index}][{key!r}] must have as many as the {used} input_ids, got {len(part)}"
                    )
                batch[key][index, :used] = part
            lengths.append(sizes)
        if self.mask == "flashmask":
            batch["attn_mask_startend_row_indices"] = self._row_indices(lengths)
        else:
            batch["attention_mask"] = self._dense(lengths)
        return batch

    def _row_indices(self, lengths: Sequence[np.ndarray]) -> np.ndarray:
        # 0 for padding: its columns are masked from row 0 on, and no column is open to its rows.
        indices = np.zeros((len(lengths), 1, self.max_length), dtype=np.int32)
        for index, sizes in enumerate(lengths):
            indices[index, 0, : sizes.sum()] = np.repeat(np.cumsum(sizes), sizes)
        return indices

    def _dense(self, lengths: Sequence[np.ndarray]) -> np.ndarray:
        mask = np.zeros((len(lengths), 1, self.max_length, self.max_length), dtype=bool)
        for index, sizes in enumerate(lengths):
            for end, size in zip(np.cumsum(sizes), sizes, strict=True):
                mask[index, 0, end - size : end, end - size : end] = np.tri(size, dtype=bool)
        return mask
