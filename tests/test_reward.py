"""Reward models on shared prompts: losses by hand, and training equal to a dense mask and to each answer alone."""

import itertools

import numpy as np
import paddle
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
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp_models import assert_same, config
from paddlenlp_models import model as causal_model

import paddle_flashmask.paddlenlp as flashmask_nlp

LOSSES = {"pairwise": flashmask_nlp.pairwise_loss, "listwise": flashmask_nlp.listwise_loss}


def score_model(family="Llama", **changes):
    paddle.seed(7)
    net = getattr(flashmask_nlp, f"{family}ForScore")(config(family, **changes))
    net.train()
    return net


# Losses


def by_hand(kind, scores, prompts, sort):
    """The same losses in plain Python loops."""
    totals = []
    for prompt in set(prompts):
        mine = [index for index, other in enumerate(prompts) if other == prompt]
        terms = []
        for i in mine:
            below = [j for j in mine if sort[i] > sort[j]]
            if kind == "pairwise":
                terms += [np.log1p(np.exp(scores[j] - scores[i])) for j in below]
            elif below:
                terms.append(-np.log(np.exp(scores[i]) / np.exp([scores[i], *(scores[j] for j in below)]).sum()))
        if terms:
            totals.append(np.mean(terms))
    return np.mean(totals)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind):
    random = np.random.default_rng(0)
    prompts = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    sort = [1, 0, 5, 3, 3, 1, 0, 7, 2, 4, 4]  # prompt 1 has a tie, prompt 3 nothing else
    scores = random.normal(size=len(sort)) * 3
    got = LOSSES[kind](*(paddle.to_tensor(np.array(x), dtype=t) for x, t in
                         ((scores, "float64"), (prompts, "int64"), (sort, "float32"))))  # fmt: skip
    assert float(got) == pytest.approx(by_hand(kind, scores, prompts, sort), rel=1e-12)
    order = random.permutation(len(sort))
    shuffled = LOSSES[kind](*(paddle.to_tensor(np.array(x)[order]) for x in (scores, prompts, sort)))
    assert float(shuffled) == pytest.approx(float(got), rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_two_answers_give_the_log_sigmoid(kind):
    scores = paddle.to_tensor([1.5, -0.5])
    loss = LOSSES[kind](scores, paddle.to_tensor([0, 0]), paddle.to_tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_to_compare_gives_0_and_extreme_scores_no_nan(kind):
    scores = paddle.to_tensor([1e4, -1e4, 0.0], stop_gradient=False)
    one_rank = LOSSES[kind](scores, paddle.to_tensor([0, 0, 1]), paddle.to_tensor([2.0, 2.0, 0.0]))
    assert float(one_rank) == 0
    wrong = LOSSES[kind](scores, paddle.to_tensor([0, 0, 0]), paddle.to_tensor([0.0, 1.0, 2.0]))
    wrong.backward()
    assert np.isfinite(float(wrong))
    assert np.isfinite(scores.grad.numpy()).all()


# Training


class Alone(flashmask_nlp.RewardTrainer):
    """Every answer in a row of its own, plain causal attention, and the losses above in loops."""

    def compute_loss(self, model, inputs, return_outputs=False):
        places, sort = inputs["response_indexs"].tolist(), inputs["response_sort"].tolist()
        positions = inputs["position_ids"].numpy()
        sequences = []
        for row, last, _ in places:
            start = last
            while positions[row, start] and positions[row, start - 1] == positions[row, start] - 1:
                start -= 1
            # A first answer follows its prompt without a jump; the others begin where the position falls back.
            sequences.append(alone(inputs, row, start, last + 1))
        ends = paddle.to_tensor([[index, len(sequence) - 1] for index, sequence in enumerate(sequences)])
        scores = model(input_ids=padded(sequences), response_indexs=ends)
        totals = []
        for prompt in sorted({place[2] for place in places}):
            mine = [index for index, place in enumerate(places) if place[2] == prompt]
            pairs = [(i, j) for i, j in itertools.permutations(mine, 2) if sort[i] > sort[j]]
            if self.reward_config.loss_type == "pairwise":
                terms = [-paddle.nn.functional.log_sigmoid(scores[i] - scores[j]) for i, j in pairs]
            else:
                ranked = sorted(mine, key=lambda index: -sort[index])
                terms = [paddle.logsumexp(scores[ranked[k:]]) - scores[ranked[k]] for k in range(len(ranked) - 1)]
            totals.append(sum(terms) / len(terms))
        return sum(totals) / len(totals)


@pytest.fixture(scope="module")
def dataset():
    return flashmask_nlp.PreferenceDataset(preferences(120, 4), LENGTH, "reward")


def make_trainer(mask, dataset, folder, family="Llama", cls=flashmask_nlp.RewardTrainer, loss="pairwise", lora=False,
                 share=True, **settings):  # fmt: skip
    args = arguments(folder, **settings)
    changes = {name: getattr(args, name) for name in ("recompute", "recompute_granularity")}
    net = score_model(family, use_flash_attention=mask == "flashmask", **changes)
    if lora:
        paddle.seed(3)
        lora_config = LoRAConfig(
            target_modules=[".*[qkvo]_proj.*"], trainable_modules=[".*score_head.*"], r=4, lora_alpha=8
        )
        net = LoRAModel(net, lora_config)
        net.mark_only_lora_as_trainable()
    collator = flashmask_nlp.PreferenceCollator(LENGTH, "reward", mask="dense" if mask == "dense" else "flashmask")
    return cls(
        model=net,
        reward_config=flashmask_nlp.RewardConfig(loss_type=loss),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collator,
    )


def train(mask, dataset, folder, **settings):
    """Loss and gradients of the first batch, losses of every step, trained weights."""
    trainer = make_trainer(mask, dataset, folder, **settings)
    first = gradients(trainer, trainer.model, [dataset[0], dataset[1]])
    trainer._sums.clear()
    logs = Logs()
    trainer.add_callback(logs)
    trainer.train()
    return first, logs["loss"], weights(trainer.model), logs


def compare(got, expected):
    assert_same(got[0], expected[0])
    assert len(got[1]) == STEPS
    np.testing.assert_allclose(got[1], expected[1], rtol=2e-4)
    for name, weight in expected[2].items():
        np.testing.assert_allclose(got[2][name], weight, atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    """The unpacked run of each setting, made once."""
    made = {}

    def run(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = train("alone", dataset, tmp_path_factory.mktemp("alone"), cls=Alone, **settings)
        return made[key]

    return run


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "listwise"}, {"family": "Qwen2"}, {"lora": True}],
    ids=["pairwise", "listwise", "Qwen2", "lora"],
)
@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_equal_to_each_answer_alone(settings, granularity, dataset, expected, tmp_path, attention_calls):  # noqa: F811
    with flashmask_nlp.enabled():
        got = train("flashmask", dataset, tmp_path, **settings, **recompute(granularity))
    # Two layers, in the first batch and in every step.
    assert len(attention_calls) == (STEPS + 1) * (2 + recomputed_layers(granularity, "lora" in settings))
    compare(got, expected(**settings))
    assert got[1][-5:].mean() < got[1][:5].mean() - 0.02, "it learns something"
    assert got[3]["accuracy"][-5:].mean() > got[3]["accuracy"][:5].mean()
    assert got[3]["margin"][-5:].mean() > got[3]["margin"][:5].mean() + 0.02
    assert "score_head.weight" in " ".join(got[2])


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_to_a_dense_mask(loss, dataset, expected, tmp_path):
    settings = {"loss": loss} if loss != "pairwise" else {}
    compare(train("dense", dataset, tmp_path, **settings), expected(**settings))


def test_sharing_the_prompt_changes_nothing_but_the_rows(tmp_path):
    """The same batch with copies of the prompts: loss and gradients are equal, and it takes more tokens."""
    samples = preferences(9, 4)
    found, tokens = [], []
    for share in (True, False):
        dataset = flashmask_nlp.PreferenceDataset(samples, 64, "reward", share_prompt=share)
        rows = [dataset[index] for index in range(len(dataset))]
        tokens.append(dataset.stats().tokens)
        with flashmask_nlp.enabled():
            trainer = make_trainer("flashmask", dataset, tmp_path)
            found.append(gradients(trainer, trainer.model, rows))
    assert_same(*found)
    assert tokens[0] < tokens[1]


def test_the_comparison_would_tell_a_wrong_mask(dataset, expected, tmp_path):
    class Causal(flashmask_nlp.RewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            inputs.pop("attention_mask")
            return super().compute_loss(model, inputs)

    wrong = train("dense", dataset, tmp_path, cls=Causal)
    assert np.abs(wrong[1] - expected()[1]).max() > 1e-2


def test_evaluation_accuracy_and_margin_by_hand(dataset, tmp_path):
    with flashmask_nlp.enabled():
        trainer = make_trainer("flashmask", dataset, tmp_path)
        metrics = trainer.evaluate()
    net = score_model()
    right = margin = pairs = 0
    for index in range(len(dataset)):
        batch = flashmask_nlp.PreferenceCollator(LENGTH, "reward", mask="dense")([dataset[index]])
        inputs = {key: paddle.to_tensor(value) for key, value in batch.items() if key != "response_sort"}
        scores = net(**inputs).numpy()
        prompts, sort = batch["response_indexs"][:, 2], batch["response_sort"]
        for i, j in itertools.permutations(range(len(scores)), 2):
            if prompts[i] == prompts[j] and sort[i] > sort[j]:
                pairs += 1
                right += scores[i] > scores[j]
                margin += scores[i] - scores[j]
    assert pairs == 120 * 6
    assert metrics["eval_accuracy"] == pytest.approx(right / pairs, abs=2 / pairs)
    assert metrics["eval_margin"] == pytest.approx(margin / pairs, rel=1e-3, abs=1e-6)


def test_evaluations_do_not_count_in_each_other(dataset, tmp_path):
    """Whatever the prefix; neither does predict, which has the same figures in its metrics."""
    other = flashmask_nlp.PreferenceDataset(preferences(30, 4)[20:], LENGTH, "reward")
    with flashmask_nlp.enabled():
        trainer = make_trainer("flashmask", dataset, tmp_path)
        expected = trainer.evaluate(other)
        for prefix in ("test", "eval_other", "train"):
            metrics = trainer.evaluate(dataset, metric_key_prefix=prefix)
            assert metrics[f"{prefix}_margin"] != expected["eval_margin"]
            assert 0 <= metrics[f"{prefix}_accuracy"] <= 1
            again = trainer.evaluate(other)
            assert [again[f"eval_{name}"] for name in ("accuracy", "margin")] == [
                expected[f"eval_{name}"] for name in ("accuracy", "margin")
            ]
        predicted = trainer.predict(other).metrics
        assert predicted["test_margin"] == expected["eval_margin"]
        assert trainer.evaluate(other)["eval_margin"] == expected["eval_margin"]


# The model


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_checkpoints(family, tmp_path):
    """A causal language model's checkpoint gives the decoder; a score model's own gives everything."""
    causal = causal_model(family)
    causal.save_pretrained(tmp_path / "causal")
    cls = flashmask_nlp.score_model_class(str(tmp_path / "causal"))
    assert cls.__name__ == f"{family}ForScore"
    net = cls.from_pretrained(str(tmp_path / "causal"))
    prefix = net.base_model_prefix
    for name, parameter in getattr(causal, prefix).named_parameters():
        np.testing.assert_array_equal(dict(getattr(net, prefix).named_parameters())[name].numpy(), parameter.numpy())
    net.save_pretrained(tmp_path / "score")
    again = cls.from_pretrained(str(tmp_path / "score"))
    net.eval()
    again.eval()
    tokens = paddle.to_tensor([[5, 6, 7, 8]])
    scores = net(tokens)
    assert scores.shape == [1, 4]
    assert scores.dtype == paddle.float32
    np.testing.assert_array_equal(again(tokens).numpy(), scores.numpy())
    one = net(tokens, response_indexs=paddle.to_tensor([[0, 2]]))
    np.testing.assert_allclose(one.numpy(), scores[0, 2:3].numpy(), rtol=1e-6)


def test_check_model_accepts_it():
    with flashmask_nlp.enabled():
        flashmask_nlp.check_model(score_model(use_flash_attention=True))


def test_refusals(dataset, tmp_path):
    with pytest.raises(ValueError, match="must be one of llama, qwen2 for a reward model, got 'qwen2_moe'"):
        flashmask_nlp.score_model_class(config("Qwen2Moe"))
    with pytest.raises(ValueError, match="loss_type must be one of pairwise, listwise, got 'mse'"):
        flashmask_nlp.RewardConfig(loss_type="mse")
    parallel = config("Llama")
    parallel.sequence_parallel = True
    with pytest.raises(ValueError, match="sequence_parallel must be False"):
        flashmask_nlp.LlamaForScore(parallel)
    net, tokens, mask = score_model(), paddle.ones([1, 4], "int64"), paddle.ones([1, 1, 4, 4], "bool")
    with pytest.raises(ValueError, match="expected at most one of them"):
        net(tokens, attention_mask=mask, attn_mask_startend_row_indices=mask)
    with pytest.raises(ValueError, match="compute_metrics is not supported"):
        flashmask_nlp.RewardTrainer(model=score_model(), args=arguments(tmp_path), compute_metrics=print)
