"""FlashMask for PaddleFormers 1.2, PaddleNLP's successor: an attention implementation for its registry.

import paddle_flashmask.paddleformers as flashmask_formers

flashmask_formers.register()                       # once, anywhere before the model attends
config._attn_implementation = "flashmask_custom"

PaddleFormers' command line with the registration done:

python -m paddle_flashmask.paddleformers train config.yaml _attn_implementation=flashmask_custom
"""

from .attention import NAME, flashmask_custom_forward, register

__all__ = ["NAME", "flashmask_custom_forward", "register"]
