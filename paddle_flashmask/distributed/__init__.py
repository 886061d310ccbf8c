"""One sequence spread over many workers: context parallelism on `paddle.distributed`.

    from paddle_flashmask.distributed import context_parallel_attention, gather_sequence, split_sequence

`split_sequence` gives each worker its part of what has a token axis (input ids, position ids, labels), the model
computes on that part, `context_parallel_attention` takes the place of `flashmask_attention`, and `gather_sequence` puts
results together where they are wanted whole. docs/context-parallel.md has an example, what it costs and what was run.
"""

from .attention import context_parallel_attention
from .shards import gather_sequence, split_sequence

__all__ = ["context_parallel_attention", "gather_sequence", "split_sequence"]
