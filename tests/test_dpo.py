"""PaddleNLP's DPOTrainer on shared prompts: equal to a dense mask, and to each answer alone with its prompt."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from alignment import (
    LENGTH,
    RECOMPUTE,
    STEPS,
    Logs,
    alone,
    arguments,
    attention_calls,  # noqa: F401 (a fixture)
    gradients,
    padded,
    preferences,
    recompute,
    recomputed_layers,
    weights,
)
from paddle.distributed import fleet
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trl import DPOCriterion, DPOTrainer
from paddlenlp_models import assert_same, model

import paddle_flashmask.paddlenlp as flashmask_nlp

MODES = ("reference", "reference free", "lora")


class Unrouted(DPOTrainer):
    """For runs outside of `enabled()`: see `test_a_single_process_needs_no_fleet`."""

    def _wrap_ref_model(self, model):
        return model


class Alone(Unrouted):
    """DPO without packing: every answer in a row of its own, plain causal attention, equation 7 of arXiv 2305.18290."""

    def compute_loss(self, model, inputs):
        pairs = inputs["response_indexs"].tolist()
        spans = [(row, a, b) for row, a, b, _ in pairs] + [(row, b, c) for row, _, b, c in pairs]
        tokens = padded([alone(inputs, *span) for span in spans])
        labels = inputs["chosen_labels"] + inputs["rejected_labels"]

        def log_probabilities(net):
            logits = net(input_ids=tokens)
            logits = logits[0] if isinstance(logits, tuple) else logits
            found = []
            for index, (row, start, end) in enumerate(spans):
                first = int(inputs["position_ids"][row, start])
                rows = F.log_softmax(logits[index, first : first + end - start], axis=-1)
                found.append(paddle.take_along_axis(rows, labels[row, start:end].unsqueeze(1), axis=1).sum())
            return paddle.stack(found)

        policy = log_probabilities(model)
        reference = paddle.zeros_like(policy)
        if not self.dpo_config.reference_free:
            with paddle.no_grad():
                if self.dpo_config.lora:
                    self.disable_lora(model)
                reference = log_probabilities(model if self.dpo_config.lora else self.ref_model)
                if self.dpo_config.lora:
                    self.enable_lora(model)
        rewards = self.dpo_config.beta * (policy - reference)
        margins = rewards[: len(pairs)] - rewards[len(pairs) :]
        self.store_metrics({"rewards/margins": margins.mean().detach().reshape([1])}, "train")
        return -F.log_sigmoid(margins).mean()


@pytest.fixture(scope="module")
def dataset():
    return flashmask_nlp.PreferenceDataset(preferences(120, 2), LENGTH, "dpo")


def make_trainer(
    mask, dataset, folder, mode="reference", family="Llama", cls=DPOTrainer, loss_type="sigmoid", **settings
):
    args = arguments(folder, **settings)
    changes = {name: getattr(args, name) for name in ("recompute", "recompute_granularity")}
    net = model(family, use_flash_attention=mask == "flashmask", **changes)
    config = flashmask_nlp.DPOConfig(beta=0.5, loss_type=loss_type, reference_free=mode == "reference free")
    reference = flashmask_nlp.reference_model(net) if mode == "reference" else None
    if mode == "lora":
        config.lora = True
        paddle.seed(3)
        net = LoRAModel(net, LoRAConfig(target_modules=[".*[qkvo]_proj.*"], r=4, lora_alpha=8))
        for name, parameter in net.named_parameters():
            if "lora_B" in name:  # zeros at first, for which lora_A has no gradient
                parameter.set_value(paddle.randn(parameter.shape) * 0.05)
        net.mark_only_lora_as_trainable()
    return cls(
        model=net,
        ref_model=reference,
        dpo_config=config,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=flashmask_nlp.PreferenceCollator(LENGTH, "dpo", mask="dense" if mask == "dense" else "flashmask"),
    )


def train(mask, dataset, folder, **settings):
    """Loss and gradients of the first batch, losses and reward margins of every step, trained weights."""
    trainer = make_trainer(mask, dataset, folder, **settings)
    net = trainer.model
    first = gradients(trainer, net, [dataset[0], dataset[1]])
    trainer._stored_metrics.clear()
    logs = Logs()
    trainer.add_callback(logs)
    trainer.train()
    return first, logs["loss"], logs["rewards/margins"], weights(net)


def compare(got, expected):
    assert_same(got[0], expected[0])
    assert len(got[1]) == STEPS
    # The same weights at step 1, and float32 rounding that the optimizer carries on.
    np.testing.assert_allclose(got[1], expected[1], rtol=2e-4)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-3, atol=1e-4)
    assert len(expected[3]) >= 8
    for name, weight in expected[3].items():
        np.testing.assert_allclose(got[3][name], weight, atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    """The unpacked run of each mode, made once."""
    made = {}

    def run(mode, family="Llama"):
        if (mode, family) not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[mode, family] = train("alone", dataset, folder, mode=mode, family=family, cls=Alone)
        return made[mode, family]

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_equal_to_each_answer_alone(mode, granularity, dataset, expected, tmp_path, attention_calls):  # noqa: F811
    with flashmask_nlp.enabled():
        got = train("flashmask", dataset, tmp_path, mode=mode, **recompute(granularity))
    compare(got, expected(mode))
    # Two layers, and the reference's, in the first batch and in every step.
    layers = 2 if mode == "reference free" else 4
    assert len(attention_calls) == (STEPS + 1) * (layers + recomputed_layers(granularity, mode == "lora"))
    assert got[1][-5:].mean() < got[1][:5].mean() - 0.02, "it learns something"
    assert got[2][-5:].mean() > got[2][:5].mean() + 0.05


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_a_dense_mask(mode, dataset, expected, tmp_path):
    compare(train("dense", dataset, tmp_path, mode=mode, cls=Unrouted), expected(mode))


@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_qwen2(granularity, dataset, expected, tmp_path):
    with flashmask_nlp.enabled():
        got = train("flashmask", dataset, tmp_path, family="Qwen2", **recompute(granularity))
    compare(got, expected("reference", "Qwen2"))


def test_the_comparison_would_tell_a_wrong_mask(dataset, expected, tmp_path):
    """Answers that see each other give other losses, far outside the tolerance."""

    class Causal(Unrouted):
        def compute_loss(self, model, inputs):
            inputs.pop("attention_mask")
            return super().compute_loss(model, inputs)

    wrong = train("dense", dataset, tmp_path, cls=Causal)
    assert np.abs(wrong[1] - expected("reference")[1]).max() > 1e-2


def test_evaluation_and_resume(dataset, tmp_path):
    """Evaluation logs margins; a run resumed from its checkpoint ends like the one that was not interrupted."""
    with flashmask_nlp.enabled():
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "evaluation_strategy": "no"}
        with paddle.utils.unique_name.guard():  # Paddle's optimizer states go by names that count up in a process
            whole = make_trainer("flashmask", dataset, tmp_path, **settings)
            whole.train()
        with paddle.utils.unique_name.guard():
            resumed = make_trainer("flashmask", dataset, tmp_path, **settings)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
            metrics = resumed.evaluate()
    for name, weight in weights(whole.model).items():
        np.testing.assert_allclose(weights(resumed.model)[name], weight, atol=1e-6, err_msg=name)
    dense = make_trainer("dense", dataset, tmp_path / "dense", cls=Unrouted)
    dense.model.set_state_dict(resumed.model.state_dict())
    expected = dense.evaluate()
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-4), key


def test_a_single_process_needs_no_fleet(dataset, tmp_path, monkeypatch):
    """Paddle 3.3.1: `fleet.distributed_model` fails where nobody called `fleet.init`."""

    def fails(layer):
        raise AttributeError("'Fleet' object has no attribute '_user_defined_strategy'")

    monkeypatch.setattr(fleet, "distributed_model", fails)
    with pytest.raises(AttributeError, match="_user_defined_strategy"):
        make_trainer("flashmask", dataset, tmp_path)
    with flashmask_nlp.enabled():
        trainer = make_trainer("flashmask", dataset, tmp_path)
        assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert not trainer.ref_model_wrapped.training


def test_sft_loss_counts_token_0(dataset, tmp_path):
    """Token 0 is a token: the SFT loss of DPO is the mean over the chosen answers' tokens."""
    config = flashmask_nlp.DPOConfig(reference_free=True, sft_loss_ratio=1.0)
    logits = paddle.randn([1, 8, 5])
    chosen, rejected = paddle.zeros([1, 8], "int64"), paddle.zeros([1, 8], "int64")
    chosen[0, 2:5] = paddle.to_tensor([3, 0, 2])
    rejected[0, 5:7] = paddle.to_tensor([1, 4])
    labels = (chosen, rejected, paddle.to_tensor([[0, 2, 5, 7]]), paddle.zeros([1]), paddle.zeros([1]))
    criterion = DPOCriterion(model("Llama").config, dpo_config=config)
    expected = F.cross_entropy(logits[0, 2:5], chosen[0, 2:5])
    assert float(criterion(logits, labels)[2]) == pytest.approx(1.5 * float(expected), rel=1e-5)
    with flashmask_nlp.enabled():
        assert float(criterion(logits, labels)[2]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("given", ["argument", "criterion"])
def test_ignore_eos_token_is_refused(given, dataset, tmp_path):
    """PaddleNLP's offset would skip the first token of each rejected answer: it is learned in this layout."""
    config = flashmask_nlp.DPOConfig(reference_free=True)
    net = model("Llama", use_flash_attention=True)
    skips = {"ignore_eos_token": True}
    settings = skips if given == "argument" else {"dpo_criterion": DPOCriterion(net.config, config, **skips)}
    common = {"model": net, "dpo_config": config, "args": arguments(tmp_path), "train_dataset": dataset}
    collator = flashmask_nlp.PreferenceCollator(LENGTH, "dpo")
    with flashmask_nlp.enabled():
        with pytest.raises(ValueError, match="ignore_eos_token must be False with a PreferenceCollator, got True"):
            DPOTrainer(**common, **settings, data_collator=collator)
        assert not DPOTrainer(**common, data_collator=collator).dpo_criterion.ignore_eos_token
        assert DPOTrainer(**common, **settings, data_collator=list).dpo_criterion.ignore_eos_token, "another layout"


def test_reference_model_is_a_frozen_copy():
    net = model("Llama")
    frozen = flashmask_nlp.reference_model(net)
    assert all(parameter.stop_gradient for parameter in frozen.parameters())
    assert not any(parameter.stop_gradient for parameter in net.parameters())
    before = frozen.llama.embed_tokens.weight.numpy().copy()
    net.llama.embed_tokens.weight.set_value(paddle.zeros_like(net.llama.embed_tokens.weight))
    np.testing.assert_array_equal(frozen.llama.embed_tokens.weight.numpy(), before)
    with pytest.raises(TypeError, match="LoRAModel"):
        flashmask_nlp.reference_model(LoRAModel(net, LoRAConfig(target_modules=[".*q_proj.*"], r=2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be orpo or one of sigmoid"),
        ({"beta": 0}, "beta must be above 0"),
        ({"label_smoothing": 0.7}, "label_smoothing must be from 0 to 0.5"),
        ({"loss_type": "dpop", "reference_free": True}, "needs a reference model"),
        ({"ref_model_update_steps": 2, "reference_free": True}, "ref_model_update_steps must be -1 .* got 2"),
        ({"ref_model_update_steps": 2, "loss_type": "orpo"}, "ref_model_update_steps must be -1 .* got 2"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        flashmask_nlp.DPOConfig(**settings)


def test_updates_of_a_reference_that_is_the_policy():
    config = flashmask_nlp.DPOConfig(ref_model_update_steps=2)
    config.lora = False
    with pytest.raises(ValueError, match=r"ref_model_update_steps must be -1 .* got 2, but lora is True"):
        config.lora = True


@pytest.mark.parametrize(
    ("settings", "checkpoint", "message"),
    [
        ({"gradient_accumulation_steps": 4}, None, "-1 with gradient_accumulation_steps above 1, got 2 and 4"),
        ({}, "checkpoint-3", "-1 with resume_from_checkpoint, got 2 and checkpoint-3"),
        ({}, True, "-1 with resume_from_checkpoint, got 2 and True"),
        ({"resume_from_checkpoint": "checkpoint-3"}, None, "-1 with resume_from_checkpoint, got 2 and checkpoint-3"),
    ],
)
def test_updates_of_the_reference_that_go_wrong_are_refused(settings, checkpoint, message, dataset, tmp_path):
    """PaddleNLP saves no reference model, and counts batches as steps."""
    with flashmask_nlp.enabled():
        trainer = make_trainer("flashmask", dataset, tmp_path, **settings)
        trainer.dpo_config.ref_model_update_steps = 2
        with pytest.raises(ValueError, match=f"ref_model_update_steps must be {message}: "):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_updates_of_the_reference(dataset, tmp_path):
    """Where each step is one batch they do what they say."""
    with flashmask_nlp.enabled():
        trainer = make_trainer("flashmask", dataset, tmp_path, max_steps=2)
        trainer.dpo_config.ref_model_update_steps = 1
        logs = Logs()
        trainer.add_callback(logs)
        trainer.train()
    assert logs["rewards/margins"].tolist() == [0, 0], "the policy is compared with itself"


def test_losses_without_reference():
    assert flashmask_nlp.DPOConfig(loss_type="simpo").reference_free
    orpo = flashmask_nlp.DPOConfig(loss_type="orpo")
    assert (orpo.loss_type, orpo.reference_free, orpo.sft_loss_ratio) == ("or", True, 1.0)
