"""Where dropout's two numbers come from: Paddle's own generators, so that paddle.seed and recompute hold."""

from __future__ import annotations

from typing import Any

import paddle


def draw_seed_offset(rng_name: str) -> paddle.Tensor:
    """Two int64 from Paddle's default generator, or from the named one of fleet's tracker.

    Recompute restores that generator before it runs the forward pass again, so the same scores are dropped.
    """
    if not rng_name:
        return _draw()
    from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

    tracker = get_rng_state_tracker()
    if rng_name not in tracker.states_:
        raise ValueError(f"rng_name: expected one of fleet's RNG states, {sorted(tracker.states_)}, got {rng_name!r}")
    if not paddle.in_dynamic_mode():
        # The tracker switches generators while Python runs; a program would use the default one when it runs later.
        raise ValueError(
            f"rng_name: expected an empty string in a static program, got {rng_name!r}; pass fixed_seed_offset instead"
        )
    with tracker.rng_state(rng_name):
        return _draw()


def _draw() -> Any:
    return paddle.randint(0, 2**31 - 1, shape=[2], dtype="int64")
