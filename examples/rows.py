"""Packed rows for training and for evaluation, from files in PaddleNLP's formats."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import paddle_flashmask.paddlenlp as flashmask_nlp


def padding(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def training_file(data: str | Path) -> Path:
    """The file of --dataset_name_or_path `data`: itself, or train.json in a folder."""
    return Path(data) / "train.json" if Path(data).is_dir() else Path(data)


def longest_sample(*datasets: Any) -> int:
    return max(dataset.longest_sample for dataset in datasets if dataset is not None)


def packed_pairs(
    tokenizer: Any, data_args: Any, example_args: Any, mask: Literal["flashmask", "dense"]
) -> tuple[flashmask_nlp.PackedDataset, flashmask_nlp.PackedDataset | None, flashmask_nlp.PackingCollator]:
    """Prompts and answers, many samples a row, none of which sees another; printed statistics.

    Evaluated is dev.json beside train.json, if --dataset_name_or_path is a folder that has it; else every
    --eval_every-th sample, which is then not trained on.
    """
    data = Path(data_args.dataset_name_or_path)

    def read(file: Path) -> list[dict[str, list[int]]]:
        pairs = itertools.islice(flashmask_nlp.read_pairs(file), example_args.max_samples or None)
        return [flashmask_nlp.encode_pair(tokenizer, *pair) for pair in pairs]

    samples = read(training_file(data))
    held_out = []
    if data.is_dir() and (data / "dev.json").exists():
        held_out = read(data / "dev.json")
    elif example_args.eval_every:
        every = example_args.eval_every
        if samples and len(samples[::every]) == len(samples):
            raise SystemExit(
                f"--eval_every must leave samples to train on: {every} keeps all of {len(samples):,} for evaluation; 0 "
                "keeps none"
            )
        held_out = samples[::every]
        samples = [sample for index, sample in enumerate(samples) if index % every]

    def pack(part: list[dict[str, list[int]]]) -> flashmask_nlp.PackedDataset:
        strategy: Literal["greedy", "in_order"] = "greedy" if data_args.greedy_zero_padding else "in_order"
        return flashmask_nlp.PackedDataset(part, data_args.max_length, strategy, too_long="skip")

    dataset = pack(samples)
    eval_dataset = pack(held_out) if held_out else None
    print(f"{dataset.stats()}; {len(held_out):,} samples are kept for evaluation", flush=True)
    return dataset, eval_dataset, flashmask_nlp.PackingCollator(data_args.max_length, padding(tokenizer), mask)


def packed_preferences(
    tokenizer: Any,
    data_args: Any,
    example_args: Any,
    task: Literal["dpo", "reward"],
    mask: Literal["flashmask", "dense"],
    share_prompt: bool = True,
) -> tuple[flashmask_nlp.PreferenceDataset, flashmask_nlp.PreferenceDataset | None, flashmask_nlp.PreferenceCollator]:
    """Prompts with their answers (two for DPO), an answer sees its prompt and itself; printed statistics.

    Of both files the first --max_samples are used.
    """

    def packed(path: str, strategy: Literal["greedy", "in_order"]) -> flashmask_nlp.PreferenceDataset:
        samples = flashmask_nlp.read_preferences(path, 2 if task == "dpo" else None)
        samples = itertools.islice(samples, example_args.max_samples or None)
        return flashmask_nlp.PreferenceDataset(
            (flashmask_nlp.encode_preference(tokenizer, sample) for sample in samples),
            data_args.max_seq_len,
            task,
            strategy=strategy,
            too_long="skip",
            max_prompt_length=data_args.max_prompt_len,
            share_prompt=share_prompt,
        )

    dataset = packed(data_args.train_dataset_path, "greedy" if data_args.greedy_zero_padding else "in_order")
    eval_dataset = packed(data_args.dev_dataset_path, "greedy") if data_args.dev_dataset_path else None
    print(dataset.stats(), flush=True)
    return (
        dataset,
        eval_dataset,
        flashmask_nlp.PreferenceCollator(data_args.max_seq_len, task, padding(tokenizer), mask),
    )


def first_row_groups(dataset: flashmask_nlp.PreferenceDataset) -> list[list[int]]:
    """Lengths `[prompt, answer, answer, ...]` of the groups in the first row, for a picture of its mask."""
    groups: dict[int, list[int]] = {}
    before = 0
    for start, end, group in dataset[0]["branches"].tolist():
        groups.setdefault(group, [start - before]).append(end - start)
        before = end
    return list(groups.values())
