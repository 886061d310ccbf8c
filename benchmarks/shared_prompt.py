"""What storing a prompt once for all its answers saves: tokens and seconds of a reward model's training step (CPU).

    python benchmarks/shared_prompt.py --json results.json

Every case holds the same prompts and answers, packed into rows, once with a shared prompt and once with a copy of it
for each answer. Loss and gradients are equal either way (tests/test_reward.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
import paddle
from paddlenlp.transformers import LlamaConfig
from paddlenlp.utils.log import logger
from rich.console import Console
from rich.table import Table

import paddle_flashmask.paddlenlp as flashmask_nlp

logger.set_level("ERROR")
VOCABULARY = 4096


def samples(count: int, answers: int, prompt: int, answer: int) -> list[dict[str, Any]]:
    """Lengths vary by a quarter around `prompt` and `answer`."""
    random = np.random.default_rng(0)

    def tokens(mean: int) -> list[int]:
        return random.integers(1, VOCABULARY, random.integers(mean * 3 // 4, mean * 5 // 4 + 1)).tolist()

    ranks = list(range(answers, 0, -1))
    return [
        {"prompt": tokens(prompt), "responses": [tokens(answer) for _ in ranks], "sort": ranks} for _ in range(count)
    ]


def measure(model: Any, dataset: flashmask_nlp.PreferenceDataset, repeats: int) -> float:
    """Seconds for forward and backward of all rows, one after another: the fastest of `repeats`."""
    collator = flashmask_nlp.PreferenceCollator(dataset.max_length, "reward")
    batches = [
        {key: paddle.to_tensor(value) for key, value in collator([dataset[index]]).items()}
        for index in range(len(dataset))
    ]

    def step(batch: dict[str, paddle.Tensor]) -> None:
        inputs = {key: value for key, value in batch.items() if key != "response_sort"}
        places = batch["response_indexs"]
        flashmask_nlp.pairwise_loss(model(**inputs), places[:, 2], batch["response_sort"]).backward()

    step(batches[0])  # warms up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            step(batch)
        seconds.append(time.perf_counter() - start)
        model.clear_gradients()
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4, 8], help="answers a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt, on average")
    parser.add_argument("--answer", type=int, default=96, help="tokens of an answer, on average")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in all")
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()

    flashmask_nlp.enable()
    paddle.seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=arguments.row,
        use_flash_attention=True,
    )
    model = flashmask_nlp.LlamaForScore(config)
    results = []
    for answers in arguments.answers:
        made = samples(arguments.prompts, answers, arguments.prompt, arguments.answer)
        figures: dict[str, Any] = {"answers": answers}
        for name, share in (("shared", True), ("copies", False)):
            dataset = flashmask_nlp.PreferenceDataset(made, arguments.row, "reward", share_prompt=share)
            figures[name] = {
                "tokens": dataset.stats().tokens,
                "rows": len(dataset),
                "seconds": measure(model, dataset, arguments.repeats),
            }
        results.append(figures)

    table = Table(
        title=f"{arguments.prompts} prompts of about {arguments.prompt} tokens, answers of {arguments.answer}"
    )
    for heading in ("answers", "tokens: copies", "shared", "", "seconds: copies", "shared", ""):
        table.add_column(heading, justify="right")
    for figures in results:
        copies, shared = figures["copies"], figures["shared"]
        tokens = (f"{copies['tokens']:,}", f"{shared['tokens']:,}", f"{copies['tokens'] / shared['tokens']:.2f}x")
        seconds = (f"{copies['seconds']:.2f}", f"{shared['seconds']:.2f}")
        table.add_row(str(figures["answers"]), *tokens, *seconds, f"{copies['seconds'] / shared['seconds']:.2f}x")
    Console().print(table)
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": os.environ["OMP_NUM_THREADS"]}
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
