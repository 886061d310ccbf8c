"""PaddleNLP's SFTTrainer on packed rows: the loss curve with row indices equals the one with a dense mask."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from alignment import gradients, padded
from paddlenlp.trainer import TrainerCallback
from paddlenlp.trl import SFTConfig, SFTTrainer
from paddlenlp_models import LENGTH, VOCABULARY, assert_same, model

import paddle_flashmask.paddlenlp as flashmask_nlp

STEPS = 20


class Tokenizer:
    """The trainer wants one; it is not asked for anything here."""

    pad_token_id = 0
    chat_template = None

    def save_pretrained(self, folder):
        return


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


class Alone(SFTTrainer):
    """SFT without packing: every sample in a row of its own, plain causal attention, the mean over all learned tokens.

    The batches are those of the packed run; the row indices only say where a sample ends.
    """

    def compute_loss(self, model, inputs, return_outputs=False):
        tokens, labels = [], []
        for row, ends in enumerate(inputs["attn_mask_startend_row_indices"][:, 0].numpy()):
            for end in sorted({*ends.tolist()} - {0}):
                start = int((ends == end).argmax())
                tokens.append(inputs["input_ids"][row, start:end].numpy())
                labels.append(inputs["labels"][row, start:end].numpy())
        logits = model(input_ids=padded(tokens))
        logits = logits[0] if isinstance(logits, tuple) else logits
        terms = [
            F.cross_entropy(logits[i, : len(answer)], paddle.to_tensor(answer), ignore_index=-100, reduction="sum")
            for i, answer in enumerate(labels)
        ]
        return sum(terms) / sum(int((answer != -100).sum()) for answer in labels)


def first_batch(trainer, dataset):
    """Loss and gradients of one batch, before training."""
    return gradients(trainer, trainer.model, [dataset[0], dataset[1]])


@pytest.fixture(scope="module")
def dataset():
    random = np.random.default_rng(1)
    made = []
    for length in random.integers(5, 31, 200):
        # Small numbers are frequent, and an answer repeats its first token: there is something to learn.
        tokens = np.minimum(random.geometric(0.15, length), VOCABULARY - 1)
        made.append({"input_ids": tokens, "labels": np.where(np.arange(length) < 3, -100, tokens[0])})
    return flashmask_nlp.PackedDataset(made, LENGTH)


def train(
    mask,
    dataset,
    folder,
    family="Llama",
    collator=flashmask_nlp.PackingCollator,
    cls=SFTTrainer,
    first=None,
    **settings,
):
    """Losses of every step and the trained weights. Loss and gradients of the first batch go to the list `first`."""
    use_flash_attention = mask == "flashmask"
    args = SFTConfig(
        output_dir=str(folder / mask),
        device="cpu",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=["none"],
        seed=5,
        **settings,
    )
    changes = {name: getattr(args, name) for name in ("recompute", "recompute_granularity", "recompute_use_reentrant")}
    net = model(family, use_flash_attention=use_flash_attention, **changes)
    losses = Losses()
    trainer = cls(
        model=net,
        args=args,
        train_dataset=dataset,
        data_collator=collator(LENGTH, mask="dense" if mask == "dense" else "flashmask"),
        tokenizer=Tokenizer(),
        callbacks=[losses],
    )
    if first is not None:
        first.append(first_batch(trainer, dataset))
    trainer.train()
    return np.array(losses.values), {name: p.numpy() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"recompute": True, "recompute_granularity": "full"}),
        ("Llama", {"recompute": True, "recompute_granularity": "full_attn"}),
        ("Llama", {"recompute": True, "recompute_granularity": "core_attn", "recompute_use_reentrant": True}),
        ("Llama", {"gradient_accumulation_steps": 2}),
        ("Qwen2", {}),
    ],
    ids=["plain", "recompute full", "recompute full_attn", "recompute core_attn", "accumulation", "Qwen2"],
)
def test_equal_loss_curves(family, settings, dataset, tmp_path):
    with flashmask_nlp.enabled():
        losses, weights = train("flashmask", dataset, tmp_path, family, **settings)
    accumulation = {k: v for k, v in settings.items() if k == "gradient_accumulation_steps"}
    expected, expected_weights = train("dense", dataset, tmp_path, family, **accumulation)
    assert len(losses) == len(expected) == STEPS
    assert expected[-5:].mean() < expected[:5].mean() - 0.3, "it learns something"
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, weight in expected_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_equal_to_each_sample_alone(family, dataset, tmp_path):
    """Loss and every gradient of the first batch, the loss curve, and the trained weights."""
    first = []
    with flashmask_nlp.enabled():
        losses, weights = train("flashmask", dataset, tmp_path, family, first=first)
    expected, expected_weights = train("alone", dataset, tmp_path, family, cls=Alone, first=first)
    assert_same(*first)
    assert len(losses) == len(expected) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for name, weight in expected_weights.items():
        np.testing.assert_allclose(weights[name], weight, atol=2e-4, err_msg=name)


def test_the_curves_would_tell_a_wrong_mask(dataset, tmp_path):
    """Plain causal attention over the packed samples gives another curve, far outside the tolerance above."""

    class Causal(flashmask_nlp.PackingCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            del batch["attention_mask"]
            return batch

    expected, _ = train("dense", dataset, tmp_path)
    causal, _ = train("dense", dataset, tmp_path, collator=Causal)
    assert np.abs(causal - expected).max() > 1e-2


def test_evaluation_and_prediction(dataset, tmp_path):
    """Evaluation of packed rows: the same loss either way, also through SFTTrainer's own prediction step."""
    found = {}
    with flashmask_nlp.enabled():
        for mask in ("flashmask", "dense"):
            args = SFTConfig(
                output_dir=str(tmp_path / mask),
                device="cpu",
                per_device_eval_batch_size=2,
                disable_tqdm=True,
                report_to=["none"],
            )
            trainer = SFTTrainer(
                model=model("Llama", use_flash_attention=mask == "flashmask"),
                args=args,
                eval_dataset=dataset,
                data_collator=flashmask_nlp.PackingCollator(LENGTH, mask=mask),
                tokenizer=Tokenizer(),
            )
            found[mask] = trainer.evaluate()["eval_loss"]
            batch = {k: paddle.to_tensor(v) for k, v in trainer.data_collator([dataset[0]]).items()}
            loss, tokens, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
            found[f"{mask} step"] = float(loss)
            assert tokens.shape == [1, LENGTH, 1]
    assert found["flashmask"] == pytest.approx(found["dense"], rel=1e-6)
    assert found["flashmask step"] == pytest.approx(found["dense step"], rel=1e-6)
