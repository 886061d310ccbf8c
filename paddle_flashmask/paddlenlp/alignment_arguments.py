"""Training arguments for DPO and reward models."""

from __future__ import annotations

from dataclasses import dataclass

from paddlenlp.trainer import TrainingArguments
from paddlenlp.transformers.configuration_utils import llmmetaclass

__all__ = ["AlignmentTrainingArguments"]


@dataclass
@llmmetaclass
class AlignmentTrainingArguments(TrainingArguments):
    """PaddleNLP's ``TrainingArguments`` with what reaches the model (``use_flash_attention``,
    ``recompute_granularity``, ...): ``SFTConfig`` without SFT's own arguments."""
