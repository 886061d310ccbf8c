"""Preference samples, a training loop and comparisons for the tests of DPO and reward models."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddlenlp.trainer import TrainerCallback
from paddlenlp.transformers.llama import fusion_ops
from paddlenlp_models import VOCABULARY

import paddle_flashmask.paddlenlp as flashmask_nlp

LENGTH = 64
STEPS = 20
RECOMPUTE = (None, "full", "full_attn", "core_attn")


def preferences(count: int, answers: int, seed: int = 1) -> list[dict[str, Any]]:
    """Prompts with answers of tiny tokens; better answers hold smaller ones: there is something to learn."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        sizes = random.integers(2, 9, answers)
        made.append(
            {
                "prompt": random.integers(1, VOCABULARY, random.integers(1, 12)).tolist(),
                "responses": [
                    np.minimum(random.geometric(0.3, size) + 8 * rank, VOCABULARY - 1).tolist()
                    for rank, size in enumerate(sizes)
                ],
                "sort": list(range(answers, 0, -1)),
            }
        )
    return made


class Logs(TrainerCallback):
    """What the trainer logs at every step."""

    def __init__(self) -> None:
        self.all: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.all.append(dict(logs))

    def __getitem__(self, key: str) -> np.ndarray:
        return np.array([logs[key] for logs in self.all])


def arguments(folder: Any, **settings: Any) -> Any:
    return flashmask_nlp.AlignmentTrainingArguments(
        **{
            "output_dir": str(folder),
            "device": "cpu",
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": ["none"],
            "seed": 5,
            **settings,
        }
    )


def recompute(granularity: str | None) -> dict[str, Any]:
    """Training arguments for one of `RECOMPUTE`."""
    return {"recompute": True, "recompute_granularity": granularity} if granularity else {}


def recomputed_layers(granularity: str | None, lora: bool) -> int:
    """How many of the two layers compute their attention again in the backward pass.

    PaddleNLP recomputes a layer, or its attention, only if the layer's input has a gradient. With LoRA the embedding is
    frozen, and the first layer's has none; its query and key have.
    """
    if granularity is None:
        return 0
    return 1 if lora and granularity != "core_attn" else 2


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every call of the routed attention, recomputation included."""
    made: list[str] = []
    original = fusion_ops.no_recompute

    def counting(function, *args, **kwargs):
        made.append(function.__qualname__)
        return original(function, *args, **kwargs)

    monkeypatch.setattr(fusion_ops, "no_recompute", counting)
    return made


def weights(net: Any) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in net.named_parameters() if not p.stop_gradient}


def gradients(trainer: Any, net: Any, rows: list[dict[str, np.ndarray]]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one batch, before training."""
    inputs = {key: paddle.to_tensor(value) for key, value in trainer.data_collator(rows).items()}
    loss = trainer.compute_loss(net, inputs)
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in net.named_parameters() if p.grad is not None}
    net.clear_gradients()
    return float(loss), found


def alone(batch: dict[str, paddle.Tensor], row: int, start: int, end: int) -> np.ndarray:
    """The tokens of one branch of a packed row behind those of its prompt."""
    tokens, positions = batch["input_ids"][row].numpy(), batch["position_ids"][row].numpy()
    if positions[start] == 0:
        return tokens[start:end]
    # The group begins at the last 0 that is followed by the prompt: walk back over the answers in between.
    group = start
    while positions[group] != 0:
        group -= 1
    return np.concatenate([tokens[group : group + positions[start]], tokens[start:end]])


def padded(sequences: list[np.ndarray]) -> paddle.Tensor:
    """Sequences padded on the right: plain causal attention keeps the padding from them."""
    out = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for index, sequence in enumerate(sequences):
        out[index, : len(sequence)] = sequence
    return paddle.to_tensor(out)
