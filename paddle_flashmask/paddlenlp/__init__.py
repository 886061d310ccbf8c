"""FlashMask for PaddleNLP 3.0.0b4: routing of its models, the ``--flash_mask`` argument, and packing for SFT.

import paddle_flashmask.paddlenlp as flashmask_nlp

flashmask_nlp.enable()   # every model that takes attn_mask_startend_row_indices now runs on this package's op
"""

from .arguments import check_model, enable_from_args
from .data import read_pairs
from .families import MODELS
from .packing import PackedDataset, PackingCollator, encode_pair, pack_lengths
from .switch import disable, enable, enabled, is_enabled

__all__ = [
    "MODELS",
    "PackedDataset",
    "PackingCollator",
    "check_model",
    "disable",
    "enable",
    "enable_from_args",
    "enabled",
    "encode_pair",
    "is_enabled",
    "pack_lengths",
    "read_pairs",
]
