"""Packed rows in which a prompt is stored once for all its answers (the `share_question` mask).

A group is a prompt and its branches. A branch sees the prompt and itself, not the other branches; its position ids
continue after the prompt, so each branch is computed as if it stood alone behind the prompt. In row indices that is one
number a token: the end of the group for the prompt, the end of the branch for a branch.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import paddle

from ._common import (
    finite,
    integers,
    refuse_dropped_mask,
    require_choice,
    require_keys,
    require_pad_token,
    require_positive,
    spread,
    token_array,
)
from .packing import IGNORE, STRATEGIES, pack_lengths
from .preference import EncodedPreference

__all__ = ["PreferenceCollator", "PreferenceDataset", "PreferenceStats"]

logger = logging.getLogger(__name__)

Task = Literal["dpo", "reward"]
Integers = npt.NDArray[np.int64]

_OWN_KEY: dict[Task, str] = {"dpo": "labels", "reward": "sort"}
"""What only the rows of this task carry: the layouts differ, so a row of one must not pass for one of the other."""


@dataclass(frozen=True)
class PreferenceStats:
    """What packing did; ``print`` it before training.

    Attributes:
        samples: prompts packed, each with its answers.
        skipped: samples left out because they, or their prompt, were too long.
        responses: answers of all packed samples.
        prompt_lengths: shortest, median and longest prompt, in tokens.
        response_lengths: the same for the answers.
        rows: rows made.
        max_length: tokens of a row.
        tokens: tokens of all rows, without padding.
        unshared_tokens: what they would be if each answer had a copy of its prompt.
        fill: tokens over the rows' capacity, from 0 to 1.
        attended: share of a row's ``max_length**2`` scores that the mask lets through, from 0 to 1, averaged over rows.
    """

    samples: int
    skipped: int
    responses: int
    prompt_lengths: tuple[int, int, int]
    response_lengths: tuple[int, int, int]
    rows: int
    max_length: int
    tokens: int
    unshared_tokens: int
    fill: float
    attended: float

    @property
    def tokens_saved(self) -> float:
        """Share of the tokens that storing each prompt once saves, from 0 to 1."""
        return 1 - self.tokens / self.unshared_tokens

    def __str__(self) -> str:
        prompt, response = ("/".join(map(str, sizes)) for sizes in (self.prompt_lengths, self.response_lengths))
        skipped = f" ({self.skipped:,} were too long)" if self.skipped else ""
        return (
            f"{self.samples:,} prompts{skipped} with {self.responses:,} answers; tokens shortest/median/longest: "
            f"prompts {prompt}, answers {response}\n"
            f"{self.rows:,} rows of {self.max_length:,} tokens, {self.fill:.1%} filled; prompts that are stored once "
            f"save {self.tokens_saved:.1%} of the tokens; the mask skips {1 - self.attended:.1%} of the scores"
        )


@dataclass(frozen=True)
class _Group:
    """One sample, laid out. Places count from the group's first token."""

    input_ids: Integers
    position_ids: Integers
    labels: Integers  # next tokens in the branches of DPO, IGNORE elsewhere; empty for reward models
    ends: Integers  # row index of each token
    branches: Integers  # [k, 2], start and end
    sort: npt.NDArray[np.float32]  # [k], ranks: 0 is the worst


def _lay_out(sample: EncodedPreference, task: Task, share_prompt: bool) -> _Group:
    prompt = sample["prompt"]
    if task == "dpo":
        # The prompt's last token predicts the first one of each answer: every branch begins with a copy of it.
        shared = prompt[:-1]
        branches = [prompt[-1:] + response[:-1] for response in sample["responses"]]
        labels = sample["responses"]
    else:
        shared, branches = (prompt, sample["responses"]) if share_prompt else ([], [])
        branches = branches or [prompt + response for response in sample["responses"]]
        labels = []
    ranks = sorted(set(sample["sort"]))
    sizes = np.array([len(branch) for branch in branches], dtype=np.int64)
    stops = len(shared) + np.cumsum(sizes)
    return _Group(
        input_ids=np.array(sum(branches, list(shared)), dtype=np.int64),
        position_ids=np.concatenate([np.arange(len(shared)), *(len(shared) + np.arange(size) for size in sizes)]),
        labels=np.array(sum(labels, [IGNORE] * len(shared)) if labels else [], dtype=np.int64),
        ends=np.concatenate([np.full(len(shared), stops[-1]), np.repeat(stops, sizes)]),
        branches=np.stack([stops - sizes, stops], axis=1),
        # Ranks: the numbers themselves may be equal, or infinite, as float32. Only their order counts.
        sort=np.array([ranks.index(number) for number in sample["sort"]], dtype=np.float32),
    )


class PreferenceDataset(paddle.io.Dataset):
    """Packed rows of prompts with their answers, for PaddleNLP's trainers; ``PreferenceCollator`` batches them.

    Args:
        samples: as ``encode_preference`` gives them.
        max_length: tokens of a row. A prompt and all its answers must fit into one.
        task: ``dpo`` (exactly two answers; rows carry ``labels``) or ``reward`` (two or more; rows carry ``sort``).
        strategy: ``greedy`` or ``in_order``, see ``pack_lengths``.
        too_long: what to do with a sample that is longer than a row, or whose prompt is longer than
            ``max_prompt_length``: ``error``, or ``skip`` and log how many. None is truncated.
        max_prompt_length: tokens of a prompt; None sets no limit.
        share_prompt: False gives each answer a copy of its prompt, to measure what sharing saves; ``reward`` only,
            because PaddleNLP's ``DPOCriterion`` wants the two answers side by side.

    Raises:
        TypeError: a sample is not a mapping with lists of integers.
        ValueError: an argument out of range; a sample with what is no token id, without prompt, with an empty answer,
            with a wrong number of answers, with a ``sort`` that tells none apart, or too long; no sample at all. The
            message names the sample's index.
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Any]],
        max_length: int,
        task: Task,
        strategy: Literal["greedy", "in_order"] = "greedy",
        too_long: Literal["error", "skip"] = "error",
        max_prompt_length: int | None = None,
        share_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.max_length = require_positive("max_length", max_length)
        require_choice("task", task, ("dpo", "reward"))
        # Before the samples are read: making them may take long.
        require_choice("strategy", strategy, STRATEGIES)
        require_choice("too_long", too_long, ("error", "skip"))
        if max_prompt_length is not None:
            require_positive("max_prompt_length", max_prompt_length)
        if task == "dpo" and not share_prompt:
            raise ValueError('share_prompt=False needs task="reward": PaddleNLP\'s DPOCriterion reads adjacent answers')
        self.task = task
        self._groups: list[_Group] = []
        self._prompt_lengths: list[int] = []
        self._response_lengths: list[int] = []
        self._unshared_tokens = 0
        self.skipped = 0
        for index, raw in enumerate(samples):
            sample = _checked_sample(index, raw, task)
            group = _lay_out(sample, task, share_prompt)
            problem = self._too_long(sample, group, max_prompt_length)
            if problem and too_long == "error":
                raise ValueError(
                    f"samples[{index}] {problem}. Raise that limit, shorten the sample, or leave such samples out with "
                    'too_long="skip"'
                )
            if problem:
                logger.debug("skipped samples[%d]: it %s", index, problem)
                self.skipped += 1
                continue
            self._groups.append(group)
            self._prompt_lengths.append(len(sample["prompt"]))
            self._response_lengths += map(len, sample["responses"])
            # DPO drops the last token of an answer, which predicts nothing.
            spare = 1 if task == "dpo" else 0
            self._unshared_tokens += sum(len(sample["prompt"]) + len(r) - spare for r in sample["responses"])
        if self.skipped:
            logger.warning(
                "skipped %d of %d samples: longer than max_length=%d, or a prompt longer than max_prompt_length=%s",
                self.skipped,
                self.skipped + len(self._groups),
                self.max_length,
                max_prompt_length,
            )
        if not self._groups:
            raise ValueError(f"samples must hold at least one sample of at most {self.max_length} tokens, got none")
        self.rows = pack_lengths([len(group.input_ids) for group in self._groups], self.max_length, strategy)

    def _too_long(self, sample: EncodedPreference, group: _Group, max_prompt_length: int | None) -> str:
        if max_prompt_length is not None and len(sample["prompt"]) > max_prompt_length:
            return f"has a prompt of {len(sample['prompt'])} tokens, more than max_prompt_length={max_prompt_length}"
        if len(group.input_ids) > self.max_length:
            return f"has {len(group.input_ids)} tokens with its answers, more than max_length={self.max_length}"
        return ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest_sample(self) -> int:
        """Positions that a model needs, in tokens: those of a prompt and its longest answer."""
        return max(int(group.position_ids.max()) + 1 for group in self._groups)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: int64 ``input_ids``, ``position_ids`` and ``ends`` (row indices) ``[tokens]``; ``branches``
        ``[answers, 3]`` (start, end, number of the group in the row). Only DPO has int64 ``labels`` ``[tokens]``, only
        a reward model float32 ``sort`` ``[answers]`` (ranks in a prompt; 0 is the worst): a collator tells by these
        which task a row is for."""
        groups = [self._groups[sample] for sample in self.rows[index]]
        starts = np.cumsum([0] + [len(group.input_ids) for group in groups])
        own = _OWN_KEY[self.task]
        return {
            "input_ids": np.concatenate([group.input_ids for group in groups]),
            "position_ids": np.concatenate([group.position_ids for group in groups]),
            "ends": np.concatenate([group.ends + start for group, start in zip(groups, starts, strict=False)]),
            "branches": np.concatenate(
                [
                    np.c_[group.branches + start, np.full(len(group.branches), number)]
                    for number, (group, start) in enumerate(zip(groups, starts, strict=False))
                ]
            ),
            own: np.concatenate([getattr(group, own) for group in groups]),
        }

    def stats(self) -> PreferenceStats:
        """Lengths, how well the rows are filled, and which share of the attention the mask leaves."""
        tokens = sum(len(group.input_ids) for group in self._groups)
        # Column j is seen by the rows from j to the end of what it belongs to.
        seen = sum(int((group.ends - np.arange(len(group.ends))).sum()) for group in self._groups)
        capacity = len(self.rows) * self.max_length
        return PreferenceStats(
            samples=len(self._groups),
            skipped=self.skipped,
            responses=len(self._response_lengths),
            prompt_lengths=spread(self._prompt_lengths),
            response_lengths=spread(self._response_lengths),
            rows=len(self.rows),
            max_length=self.max_length,
            tokens=tokens,
            unshared_tokens=self._unshared_tokens,
            fill=tokens / capacity,
            attended=seen / (capacity * self.max_length),
        )


def _checked_sample(index: int, sample: Any, task: Task) -> EncodedPreference:
    keys = {"prompt", "responses", "sort"}
    if not isinstance(sample, Mapping) or not keys <= set(sample):
        got = sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
        raise TypeError(f"samples[{index}] must be a mapping with prompt, responses and sort, got {got}")
    parts = {}
    for key in ("responses", "sort"):
        try:
            parts[key] = list(sample[key])
        except TypeError:
            got = type(sample[key]).__name__
            raise TypeError(f"samples[{index}][{key!r}] must be a list, one for each response, got {got}") from None
    responses, sort = parts["responses"], parts["sort"]
    named = {"['prompt']": sample["prompt"], **{f"['responses'][{i}]": r for i, r in enumerate(responses)}}
    arrays = []
    for name, tokens in named.items():
        array = token_array(f"samples[{index}]{name}", tokens)
        if not array.size:
            raise ValueError(f"samples[{index}]{name} has no tokens")
        arrays.append(array.tolist())
    if len(responses) < 2 or (task == "dpo" and len(responses) != 2):
        raise ValueError(
            f"samples[{index}] must have {'2' if task == 'dpo' else 'at least 2'} responses, got {len(responses)}"
        )
    if len(sort) != len(responses) or not all(finite(number) for number in sort):
        got = reprlib.repr(sort)
        raise ValueError(f"samples[{index}]['sort'] must have a number for each of {len(responses)} responses: {got}")
    order = sorted(range(len(sort)), key=lambda place: sort[place], reverse=True)  # stable
    if sort[order[0]] == sort[order[-1]]:
        raise ValueError(f"samples[{index}]['sort'] must tell better from worse, got {reprlib.repr(sort)}")
    return {
        "prompt": arrays[0],
        "responses": [arrays[1 + place] for place in order],
        "sort": [sort[place] for place in order],
    }


def _ends(branches: np.ndarray, used: int, pairs: bool) -> Integers | None:
    """The row index of each of a row's tokens, or None where a dataset makes no such branches."""
    if branches.ndim != 2 or branches.shape[1] != 3 or not np.issubdtype(branches.dtype, np.integer):
        return None
    starts, stops, prompts = branches.astype(np.int64).T
    before = np.concatenate([[0], stops])[:-1]  # where the branch before ends
    first = np.diff(prompts, prepend=-1) == 1  # of its prompt, which may lie in front of it
    follows = (starts == before) & (np.diff(prompts, prepend=-1) == 0)
    good = np.where(first, starts >= before, follows) & (stops > starts)
    if not (good.all() and len(good) and first[0] and stops[-1] == used):
        return None
    if pairs and first.tolist() != [True, False] * (len(first) // 2):
        return None
    of_prompts = stops[np.append(first[1:], True)]  # the end of each prompt's last branch
    sizes = np.stack([starts - before, stops - starts], axis=1)
    return np.repeat(np.stack([of_prompts[prompts], stops], axis=1).ravel(), sizes.ravel())


class PreferenceCollator:
    """Batches of a ``PreferenceDataset``'s rows, padded to ``max_length``, for ``DPOTrainer`` and ``RewardTrainer``.

    Gives int64 ``input_ids``, ``position_ids`` ``[b, max_length]``, one mask, and where the answers are.

    - mask ``flashmask``: int32 ``attn_mask_startend_row_indices`` ``[b, 1, max_length]``;
    - mask ``dense``: bool ``attention_mask`` ``[b, 1, max_length, max_length]``, True where row i sees column j;
    - task ``dpo``: int64 ``chosen_labels`` and ``rejected_labels`` ``[b, max_length]`` (next tokens, 0 elsewhere) and
      ``response_indexs`` ``[pairs, 4]``: row, start of the chosen answer, its end and start of the rejected one, end;
    - task ``reward``: int64 ``response_indexs`` ``[answers, 3]``: row, place of the answer's last token, number of its
      prompt in the batch; float32 ``response_sort`` ``[answers]``, its rank among the prompt's answers, 0 is the worst.

    Padding is hidden from every row and sees nothing. Both masks come from the same rows.

    Args:
        max_length: tokens of a row.
        task: as for the dataset.
        pad_token_id: token of the padding, which is masked: any will do, ``eos`` too.
        mask: ``flashmask`` or ``dense``.

    Raises:
        TypeError, ValueError: an argument is out of range, or ``mask`` is ``dense`` where the environment has
            ``USE_CASUAL_MASK=True``: PaddleNLP would ignore the mask.
    """

    def __init__(
        self, max_length: int, task: Task, pad_token_id: int = 0, mask: Literal["flashmask", "dense"] = "flashmask"
    ) -> None:
        self.max_length = require_positive("max_length", max_length)
        require_choice("task", task, ("dpo", "reward"))
        self.pad_token_id = require_pad_token(pad_token_id)
        require_choice("mask", mask, ("flashmask", "dense"))
        refuse_dropped_mask(mask)
        self.task = task
        self.mask = mask

    def __call__(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Collate rows of a ``PreferenceDataset`` of the same task.

        Raises:
            TypeError: a row lacks what a ``PreferenceDataset`` of this task puts into it; it may be of the other task.
            ValueError: no row, or a row longer than ``max_length``, or one whose parts do not fit together: labels or
                scores would be those of other tokens.
        """
        if len(rows) == 0:
            raise ValueError("rows must hold at least one row, got none")
        rows = [self._checked(index, row) for index, row in enumerate(rows)]
        batch: dict[str, np.ndarray] = {
            "input_ids": self._padded(rows, "input_ids", self.pad_token_id),
            "position_ids": self._padded(rows, "position_ids", 0),
        }
        # 0 for padding: its columns are masked from row 0 on, and no column is open to its rows.
        ends = self._padded(rows, "ends", 0)
        if self.mask == "flashmask":
            batch["attn_mask_startend_row_indices"] = ends[:, None].astype(np.int32)
        else:
            place = np.arange(self.max_length)
            batch["attention_mask"] = ((place[:, None] >= place) & (place[:, None] < ends[:, None]))[:, None]
        return {**batch, **(self._pairs(rows) if self.task == "dpo" else self._answers(rows))}

    def _checked(self, index: int, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parts of a row, which fit together."""
        by_token = ("input_ids", "position_ids", "ends", *(["labels"] if self.task == "dpo" else []))
        by_answer = ("branches", *(["sort"] if self.task == "reward" else []))
        require_keys(index, row, (*by_token, *by_answer), f'PreferenceDataset(task="{self.task}")')
        parts = {key: integers(f"rows[{index}][{key!r}]", row[key]) for key in by_token}
        used = len(parts["input_ids"])
        if used > self.max_length:
            raise ValueError(f"rows[{index}] has {used} tokens, more than max_length={self.max_length}")
        for key, part in parts.items():
            if len(part) != used:
                raise ValueError(f"rows[{index}][{key!r}] must have as many as the {used} input_ids, got {len(part)}")
        parts["branches"] = branches = np.asarray(row["branches"])
        ends = _ends(branches, used, pairs=self.task == "dpo")
        if ends is None:
            two = "two " if self.task == "dpo" else ""
            raise ValueError(
                f"rows[{index}]['branches'] must be [start, end, prompt] of {two}answers for each prompt, one after "
                f"the other, up to the end of the row's {used} tokens; got {reprlib.repr(branches.tolist())}"
            )
        if (wrong := parts["ends"] != ends).any():
            place = int(wrong.argmax())
            raise ValueError(
                f"rows[{index}]['ends'] must be the ends of the branches, and of the last one for a prompt; expected "
                f"{ends[place]} at place {place}, got {parts['ends'][place]}"
            )
        if self.task == "reward":
            parts["sort"] = np.asarray(row["sort"])
            if parts["sort"].shape != (len(branches),):
                raise ValueError(
                    f"rows[{index}]['sort'] must be a number for each of {len(branches)} answers, got shape "
                    f"{list(parts['sort'].shape)}"
                )
        return parts

    def _padded(self, rows: Sequence[Mapping[str, np.ndarray]], key: str, value: int) -> Integers:
        out = np.full((len(rows), self.max_length), value, dtype=np.int64)
        for index, row in enumerate(rows):
            out[index, : len(row[key])] = row[key]
        return out

    def _pairs(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        labels = self._padded(rows, "labels", IGNORE)
        sides = np.zeros((2, len(rows), self.max_length), dtype=np.int64)
        places = []
        for index, row in enumerate(rows):
            for chosen, rejected in row["branches"].reshape(-1, 2, 3):
                places.append([index, chosen[0], chosen[1], rejected[1]])
                for side, (start, end, _) in enumerate((chosen, rejected)):
                    sides[side, index, start:end] = labels[index, start:end]
        return {
            "chosen_labels": sides[0],
            "rejected_labels": sides[1],
            "response_indexs": np.array(places, dtype=np.int64),
        }

    def _answers(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        places = []
        prompts = 0
        for index, row in enumerate(rows):
            branches = row["branches"]
            places.append(np.c_[np.full(len(branches), index), branches[:, 1] - 1, branches[:, 2] + prompts])
            prompts += int(branches[-1, 2]) + 1
        return {
            "response_indexs": np.concatenate(places).astype(np.int64),
            "response_sort": np.concatenate([row["sort"] for row in rows]),
        }
