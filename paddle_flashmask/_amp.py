"""Automatic mixed precision: the op is cast as Paddle casts its own flash attention, an op of AMP's white list.

Paddle casts the inputs of its own ops inside generated code, which a custom op does not pass through.
"""

from __future__ import annotations

from typing import Any

import paddle

from ._checks import dtype_name

# A user names either in custom_white_list or custom_black_list of paddle.amp.auto_cast.
_NAMES = {"flash_attn", "flashmask_attention"}
_CASTABLE = ("float32", "bfloat16", "float16")


def _state() -> Any | None:
    """What holds AMP's level, dtype and op lists at the moment; None where AMP is off."""
    core = paddle.base.core
    if getattr(paddle.base.framework, "in_pir_mode", lambda: False)():
        state = core._get_amp_attrs()
        return state if state._amp_level != core.AmpLevel.O0 else None
    tracer = paddle.base.framework._dygraph_tracer()
    return tracer if tracer is not None and tracer._amp_level != core.AmpLevel.O0 else None


def target_dtype() -> str | None:
    """The dtype that AMP wants the op's inputs in; None to leave them."""
    state = _state()
    if state is None:
        return None
    lists_of = state if hasattr(state, "_get_amp_op_list") else paddle.base.core
    white, black = lists_of._get_amp_op_list()
    if _NAMES & set(black):
        return "float32"
    if _NAMES & set(white):
        return str(state._amp_dtype)
    return None


def cast(*tensors: Any) -> list[Any]:
    """`tensors` in the dtype that AMP wants, differentiably; as they are where AMP is off."""
    dtype = target_dtype()
    if dtype is None:
        return list(tensors)
    return [t.astype(dtype) if dtype_name(t) in _CASTABLE and dtype_name(t) != dtype else t for t in tensors]
