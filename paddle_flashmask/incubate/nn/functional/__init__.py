"""`flashmask_attention`, the same function as `paddle_flashmask.flashmask_attention`."""

from paddle_flashmask.functional import flashmask_attention

__all__ = ["flashmask_attention"]
