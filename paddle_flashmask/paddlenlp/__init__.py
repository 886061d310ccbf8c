"""FlashMask for PaddleNLP 3.0.0b4: routing of its models, the ``--flash_mask`` argument, packing for SFT, DPO and RM.

import paddle_flashmask.paddlenlp as flashmask_nlp

flashmask_nlp.enable()   # every model that takes attn_mask_startend_row_indices now runs on this package's op
"""

from typing import TYPE_CHECKING, Any

from .arguments import check_model, enable_from_args
from .data import read_pairs
from .dpo import DPOConfig, PreferenceDataConfig, check_reference_updates, reference_model
from .families import MODELS
from .packing import PackedDataset, PackingCollator, encode_pair, pack_lengths
from .positions import check_positions
from .preference import encode_preference, read_preferences
from .reward_loss import listwise_loss, pairwise_loss
from .shared_prompt import PreferenceCollator, PreferenceDataset
from .switch import disable, enable, enabled, is_enabled
from .verify import VerificationError, VerificationReport, verify

if TYPE_CHECKING:
    from .alignment_arguments import AlignmentTrainingArguments
    from .reward import LlamaForScore, Qwen2ForScore, RewardConfig, RewardTrainer, score_model_class
    from .verify_callback import VerifyArguments, VerifyCallback

__all__ = [
    "MODELS",
    "AlignmentTrainingArguments",
    "DPOConfig",
    "LlamaForScore",
    "PackedDataset",
    "PackingCollator",
    "PreferenceCollator",
    "PreferenceDataConfig",
    "PreferenceDataset",
    "Qwen2ForScore",
    "RewardConfig",
    "RewardTrainer",
    "VerificationError",
    "VerificationReport",
    "VerifyArguments",
    "VerifyCallback",
    "check_model",
    "check_positions",
    "check_reference_updates",
    "disable",
    "enable",
    "enable_from_args",
    "enabled",
    "encode_pair",
    "encode_preference",
    "is_enabled",
    "listwise_loss",
    "pack_lengths",
    "pairwise_loss",
    "read_pairs",
    "read_preferences",
    "reference_model",
    "score_model_class",
    "verify",
]

# In modules that import PaddleNLP, which the rest of this package does without until it is enabled.
_NEEDS_PADDLENLP = {
    "AlignmentTrainingArguments": ".alignment_arguments",
    "LlamaForScore": ".reward",
    "Qwen2ForScore": ".reward",
    "RewardConfig": ".reward",
    "RewardTrainer": ".reward",
    "VerifyArguments": ".verify_callback",
    "VerifyCallback": ".verify_callback",
    "score_model_class": ".reward",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_PADDLENLP:
        from importlib import import_module

        return getattr(import_module(_NEEDS_PADDLENLP[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
