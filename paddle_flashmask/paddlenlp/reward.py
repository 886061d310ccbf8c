"""Reward models: Llama and Qwen2 with a score head, and a trainer for them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import nn
from paddlenlp.trainer import Trainer
from paddlenlp.transformers import (
    AutoConfig,
    LlamaModel,
    LlamaPretrainedModel,
    PretrainedModel,
    Qwen2Model,
    Qwen2PretrainedModel,
)

from .reward_loss import LOSSES, comparisons

__all__ = ["LlamaForScore", "Qwen2ForScore", "RewardConfig", "RewardTrainer", "score_model_class"]


class _Score(PretrainedModel):
    """A decoder and a linear layer that gives each token a score; see ``forward``."""

    # A causal language model's head is left behind, and its checkpoint has no score head.
    _keys_to_ignore_on_load_missing = [r"score_head\.weight"]  # noqa: RUF012 (PaddleNLP's attribute)
    _keys_to_ignore_on_load_unexpected = [r"lm_head.*", r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "sequence_parallel", False):
            raise ValueError("config.sequence_parallel must be False: the score head reads tokens of whole sequences")
        self.config = config
        decoder = LlamaModel if self.base_model_prefix == "llama" else Qwen2Model
        setattr(self, self.base_model_prefix, decoder(config))
        self.score_head = nn.Linear(config.hidden_size, 1, bias_attr=False)

    def get_input_embeddings(self) -> nn.Layer:
        return self.get_decoder().embed_tokens

    def set_input_embeddings(self, value: nn.Layer) -> None:
        self.get_decoder().embed_tokens = value

    def get_decoder(self) -> PretrainedModel:
        return getattr(self, self.base_model_prefix)

    def forward(
        self,
        input_ids: paddle.Tensor | None = None,
        position_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        inputs_embeds: paddle.Tensor | None = None,
        attn_mask_startend_row_indices: paddle.Tensor | None = None,
        response_indexs: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Scores of answers.

        Args:
            input_ids, position_ids, attention_mask, inputs_embeds, attn_mask_startend_row_indices: as for PaddleNLP's
                causal language models.
            response_indexs: int64 ``[answers, 2 or more]``, row and place of the last token of each answer.

        Returns:
            float32 ``[answers]``; without ``response_indexs`` the score at every token, ``[b, s]``.

        Raises:
            ValueError: both masks at once.
        """
        if attention_mask is not None and attn_mask_startend_row_indices is not None:
            raise ValueError("attention_mask and attn_mask_startend_row_indices: expected at most one of them")
        hidden = self.get_decoder()(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=False,
            attn_mask_startend_row_indices=attn_mask_startend_row_indices,
        )
        hidden = hidden[0] if isinstance(hidden, (tuple, list)) else hidden
        if response_indexs is not None:
            hidden = hidden.gather_nd(response_indexs[:, :2])
        return self.score_head(hidden).squeeze(-1).astype("float32")


class LlamaForScore(_Score, LlamaPretrainedModel):
    """Llama with a score head. ``from_pretrained`` takes checkpoints of ``LlamaForCausalLM`` and of its own."""


class Qwen2ForScore(_Score, Qwen2PretrainedModel):
    """Qwen2 with a score head. ``from_pretrained`` takes checkpoints of ``Qwen2ForCausalLM`` and of its own."""


_CLASSES = {"llama": LlamaForScore, "qwen2": Qwen2ForScore}


def score_model_class(config: Any) -> type[LlamaForScore] | type[Qwen2ForScore]:
    """The score model for a configuration, or for the name or folder of a checkpoint.

    Raises:
        ValueError: neither Llama nor Qwen2.
    """
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    kind = getattr(config, "model_type", None)
    if kind not in _CLASSES:
        raise ValueError(f"config.model_type must be one of {', '.join(_CLASSES)} for a reward model, got {kind!r}")
    return _CLASSES[kind]


@dataclass
class RewardConfig:
    """Arguments of the reward model's loss, for ``PdArgumentParser``."""

    loss_type: str = field(
        default="pairwise", metadata={"help": "pairwise (Bradley-Terry) or listwise (Plackett-Luce)."}
    )

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {self.loss_type!r}")


class RewardTrainer(Trainer):
    """Trains a score model on batches of ``PreferenceCollator(task="reward")``.

    Logs, for training and evaluation: ``accuracy``, the share of pairs of answers that the scores put in the right
    order, and ``margin``, the mean difference of their scores: over all pairs since the last log, or of the evaluation
    set. There, and in ``predict``'s metrics, their names begin with ``metric_key_prefix``.

    Args:
        model: ``LlamaForScore``, ``Qwen2ForScore``, a LoRA model of one, or another that takes ``response_indexs`` and
            returns one score each.
        reward_config: the loss; the default is pairwise.
        kwargs: as for PaddleNLP's ``Trainer``.

    Raises:
        ValueError: pipeline parallelism, or ``compute_metrics``.
    """

    def __init__(self, model: Any, reward_config: RewardConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if self.args.pipeline_parallel_degree > 1:
            raise ValueError("pipeline_parallel_degree must be 1 for a reward model: its score head has no stage")
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics is not supported: RewardTrainer logs accuracy and margin itself")
        self.reward_config = reward_config or RewardConfig()
        # Sums over pairs: [pairs, pairs in the right order, differences of scores].
        self._sums: dict[str, list[paddle.Tensor]] = defaultdict(list)

    def _loss(self, model: Any, inputs: dict[str, paddle.Tensor], split: str) -> paddle.Tensor:
        inputs = dict(inputs)
        prompts, sort = inputs["response_indexs"][:, 2], inputs.pop("response_sort")
        scores = model(**inputs)
        with paddle.no_grad():
            better = comparisons(prompts, sort).astype("float32")
            margins = scores.unsqueeze(1) - scores.unsqueeze(0)
            right = (margins > 0).astype("float32")
            sums = paddle.stack([better.sum(), (better * right).sum(), (better * margins).sum()])
            self._sums[split].append(self._nested_gather(sums.unsqueeze(0)).sum(axis=0))
        return LOSSES[self.reward_config.loss_type](scores, prompts, sort)

    def compute_loss(self, model: Any, inputs: dict[str, paddle.Tensor], return_outputs: bool = False) -> paddle.Tensor:
        """The loss of a batch."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported by RewardTrainer")
        return self._loss(model, inputs, "train")

    def prediction_step(
        self, model: Any, inputs: dict[str, paddle.Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[paddle.Tensor, None, None]:
        """The loss of a batch without gradients; accuracy and margin are logged over the whole evaluation set."""
        inputs = self._prepare_inputs(inputs)
        with paddle.no_grad(), self.autocast_smart_context_manager():
            return self._loss(model, inputs, "eval").detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
        max_eval_iters: int | None = -1,
    ) -> Any:
        """PaddleNLP's loop of ``evaluate`` and ``predict``; its metrics get accuracy and margin of this set alone."""
        self._sums.pop("eval", None)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix, max_eval_iters
        )
        output.metrics.update(self._figures("eval", f"{metric_key_prefix}_"))
        return output

    def _figures(self, split: str, prefix: str) -> dict[str, float]:
        """Accuracy and margin since the last call; none where there was no batch."""
        if not self._sums[split]:
            return {}
        pairs, right, margins = paddle.stack(self._sums.pop(split)).sum(axis=0).tolist()
        return {f"{prefix}accuracy": right / max(pairs, 1), f"{prefix}margin": margins / max(pairs, 1)}

    def log(self, logs: dict[str, float], **kwargs: Any) -> None:
        """Add accuracy and margin of training to ``logs``, and log."""
        if "loss" in logs:
            logs.update(self._figures("train", ""))
        super().log(logs, **kwargs)
