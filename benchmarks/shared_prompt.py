"""What storing a prompt once for all its answers saves: tokens and seconds of a training step of DPO and of a reward
model (CPU).

    python benchmarks/shared_prompt.py --out results.json

Every case holds the same prompts and answers, packed into rows, once with a shared prompt and once with a copy of it
for each answer. Rows are cut to their tokens, so padding does not count. The losses are equal either way, which is
checked; so are the gradients (tests/test_reward.py, tests/test_dpo.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from paddlenlp.utils.log import logger  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import paddle_flashmask.paddlenlp as flashmask_nlp  # noqa: E402
from benchmarks import report  # noqa: E402

VOCABULARY = 4096
BETA = 0.1
Batch = dict[str, Any]


def samples(count: int, answers: int, prompt: int, answer: int) -> list[dict[str, Any]]:
    """Lengths vary by a quarter around `prompt` and `answer`."""
    random = np.random.default_rng(0)

    def tokens(mean: int) -> list[int]:
        return random.integers(1, VOCABULARY, random.integers(mean * 3 // 4, mean * 5 // 4 + 1)).tolist()

    ranks = list(range(answers, 0, -1))
    return [
        {"prompt": tokens(prompt), "responses": [tokens(answer) for _ in ranks], "sort": ranks} for _ in range(count)
    ]


def reward_batches(made: list[dict[str, Any]], row: int, share: bool) -> list[Batch]:
    dataset = flashmask_nlp.PreferenceDataset(made, row, "reward", share_prompt=share)
    collator = flashmask_nlp.PreferenceCollator(row, "reward")
    return [collator([dataset[index]]) for index in range(len(dataset))]


def reward_loss(model: Any, batch: Batch) -> paddle.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "response_sort"}
    prompts = batch["response_indexs"][:, 2]
    # The mean over the row's prompts; rows are added up, so each prompt counts the same however they are packed.
    return flashmask_nlp.pairwise_loss(model(**inputs), prompts, batch["response_sort"]) * (prompts.max() + 1)


def dpo_batches(made: list[dict[str, Any]], row: int, share: bool) -> list[Batch]:
    """With `labels`, and `spans` [pairs, 2, 2]: where the chosen and the rejected answer's labels start and end."""
    if share:
        dataset = flashmask_nlp.PreferenceDataset(made, row, "dpo")
        batches = [flashmask_nlp.PreferenceCollator(row, "dpo")([dataset[index]]) for index in range(len(dataset))]
        for batch in batches:
            places = batch.pop("response_indexs")
            batch["spans"] = np.stack([places[:, [1, 2]], places[:, [2, 3]]], axis=1)
            batch["labels"] = batch.pop("chosen_labels") + batch.pop("rejected_labels")
        return batches
    # PaddleNLP's criterion wants the answers side by side, so the copies are packed here; both of a pair in one row.
    pairs = [[(sample["prompt"], answer) for answer in sample["responses"]] for sample in made]
    sizes = [sum(len(prompt) + len(answer) - 1 for prompt, answer in pair) for pair in pairs]
    batches = []
    for members in flashmask_nlp.pack_lengths(sizes, row):
        parts = [part for member in members for part in pairs[member]]
        lengths = np.array([len(prompt) + len(answer) - 1 for prompt, answer in parts])
        packed = {
            "input_ids": np.concatenate([prompt + answer[:-1] for prompt, answer in parts]),
            "labels": np.concatenate([[0] * (len(prompt) - 1) + answer for prompt, answer in parts]),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "lengths": lengths,
        }
        batch = flashmask_nlp.PackingCollator(row)([packed])
        ends = np.cumsum(lengths)
        starts = ends - [len(answer) for _, answer in parts]
        batches.append({**batch, "spans": np.stack([starts, ends], axis=1).reshape(-1, 2, 2)})
    return batches


def dpo_loss(model: Any, reference: Any, batch: Batch) -> paddle.Tensor:
    """The sum over the row's pairs; equation 7 of arXiv 2305.18290."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "spans")}
    labels = batch["labels"].clip(min=0)  # of padding; no span holds it

    def log_probabilities(net: Any) -> paddle.Tensor:
        logits = net(**inputs)
        logits = logits[0] if isinstance(logits, tuple) else logits
        each = -F.cross_entropy(logits, labels.unsqueeze(-1), reduction="none").squeeze(-1)[0]
        return paddle.stack([each[start:end].sum() for pair in batch["spans"].tolist() for start, end in pair])

    with paddle.no_grad():  # a difference taken in here would have no gradient, and backward() would do nothing
        base = log_probabilities(reference)
    margins = (log_probabilities(model) - base).reshape([-1, 2])
    return -F.log_sigmoid(BETA * (margins[:, 0] - margins[:, 1])).sum()


def without_padding(batch: Batch) -> Batch:
    """A batch of one row, cut to its tokens: how well rows happen to be filled says nothing about sharing."""
    row = batch["input_ids"].shape[-1]
    used = int((batch["attn_mask_startend_row_indices"] > 0).sum())
    return {key: value[..., :used] if value.shape[-1] == row else value for key, value in batch.items()}


def measure(loss: Callable[[Batch], paddle.Tensor], batches: list[Batch], repeats: int) -> dict[str, Any]:
    """Seconds for forward and backward of all rows, one after another: the fastest of `repeats`; tokens; the loss."""
    batches = [without_padding(batch) for batch in batches]
    given = [{key: paddle.to_tensor(value) for key, value in batch.items()} for batch in batches]
    first = loss(given[0])  # warms up
    assert not first.stop_gradient, "the loss has no gradient: backward() would do nothing"
    first.backward()
    seconds, total = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        total = 0.0
        for batch in given:
            value = loss(batch)
            value.backward()
            total += float(value)
        seconds.append(time.perf_counter() - start)
    tokens = sum(batch["input_ids"].size for batch in batches)
    return {"tokens": tokens, "rows": len(batches), "seconds": round(min(seconds), 4), "loss": total}


def compare(task: str, answers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One task and number of answers, with copies of the prompt and with shared ones."""
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
        initializer_range=0.1,  # scores and margins far enough from 0 for a comparison of losses
    )
    made = samples(arguments.prompts, answers, arguments.prompt, arguments.answer)
    figures: dict[str, Any] = {"task": task, "answers": answers}
    model = (flashmask_nlp.LlamaForScore if task == "reward" else LlamaForCausalLM)(config)
    reference = LlamaForCausalLM(config) if task == "dpo" else None
    for name, share in (("shared", True), ("copies", False)):
        if task == "reward":
            batches, loss = reward_batches(made, arguments.row, share), lambda batch: reward_loss(model, batch)
        else:
            batches, loss = dpo_batches(made, arguments.row, share), lambda batch: dpo_loss(model, reference, batch)
        figures[name] = measure(loss, batches, arguments.repeats)
        model.clear_gradients()
    shared, copies = figures["shared"], figures["copies"]
    if abs(shared["loss"] - copies["loss"]) > 1e-4 * abs(copies["loss"]):
        raise RuntimeError(f"{task}, {answers} answers: losses differ, {shared['loss']} and {copies['loss']}")
    for key in ("tokens", "seconds"):
        figures[f"{key}_ratio"] = round(copies[key] / shared[key], 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4, 8], help="answers a prompt, reward models")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt, on average")
    parser.add_argument("--answer", type=int, default=96, help="tokens of an answer, on average")
    parser.add_argument("--prompts", type=int, default=16, help="prompts in all")
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--out", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()

    logger.set_level("ERROR")
    flashmask_nlp.enable()
    cases = [("dpo", 2), *(("reward", answers) for answers in arguments.answers)]
    rows = [compare(task, answers, arguments) for task, answers in cases]

    table = Table(
        title=f"{arguments.prompts} prompts of about {arguments.prompt} tokens, answers of {arguments.answer}"
    )
    for heading in ("task", "answers", "tokens: copies", "shared", "", "seconds: copies", "shared", ""):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for figures in rows:
        copies, shared = figures["copies"], figures["shared"]
        tokens = (f"{copies['tokens']:,}", f"{shared['tokens']:,}", f"{figures['tokens_ratio']:.2f}x")
        seconds = (f"{copies['seconds']:.2f}", f"{shared['seconds']:.2f}", f"{figures['seconds_ratio']:.2f}x")
        table.add_row(figures["task"], str(figures["answers"]), *tokens, *seconds)
    Console().print(table)
    if arguments.out:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        machine = report.cpu_machine() | {"load_average": os.getloadavg()}
        machine["versions"] = {name: metadata.version(name) for name in ("paddlepaddle", "paddlenlp")}
        header = report.header("cpu", "python benchmarks/shared_prompt.py", machine)
        report.write(arguments.out, {**header, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
