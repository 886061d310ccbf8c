"""Loads the compiled op into Paddle and calls it.

A custom op fits only the Paddle that it was compiled against: loading it into another one ends the process. So the
version recorded by setup.py is compared first.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import paddle
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

# Paddle 3 also builds PIR programs by this call; Paddle 2.6 has it for dynamic mode only.
_ONE_CALL_BUILDS_PROGRAMS = hasattr(paddle._C_ops, "_run_custom_op")
_run_custom_op = paddle._C_ops._run_custom_op if _ONE_CALL_BUILDS_PROGRAMS else paddle.base.core.eager._run_custom_op

OP_NAME = "paddle_flashmask_attention"  # Paddle has an op of its own named flashmask_attention
REBUILD = (
    "Rebuild it for the Paddle that is installed, in a checkout of paddle-flashmask: "
    "pip install --force-reinstall --no-deps --no-build-isolation ."
)


def _describe(version: str, commit: str, cuda: str) -> str:
    return f"PaddlePaddle {version} ({'CPU' if cuda in ('False', '') else 'CUDA ' + cuda}, commit {commit[:12]})"


def _check_build() -> None:
    """Raises ImportError unless the op was built for the Paddle that is imported."""
    try:
        build = importlib.import_module(f"{__package__}._build_info")
    except ImportError as error:
        raise ImportError(f"The op of paddle-flashmask is not built. {REBUILD}") from error
    installed = (str(paddle.version.full_version), str(paddle.version.commit), str(paddle.version.cuda()))
    built_for = (str(build.PADDLE_VERSION), str(build.PADDLE_COMMIT), str(build.PADDLE_CUDA))
    if installed != built_for:
        raise ImportError(
            f"paddle-flashmask was built for {_describe(*built_for)}, but {_describe(*installed)} is imported; loading "
            f"the op would end the process. {REBUILD}"
        )


def _load() -> None:
    _check_build()
    path = Path(__file__).with_name("_C.so")
    for needed in (path, path.parent / "lib" / "libflashmask.so"):
        if not needed.exists():
            raise ImportError(f"{needed} is missing. {REBUILD}")
    try:
        load_op_meta_info_and_register_op(str(path))
    except Exception as error:
        raise ImportError(f"Paddle could not load {path}: {error}. {REBUILD}") from error


def run(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None,
    block_mask: paddle.Tensor | None,
    seed_offset: paddle.Tensor | None,
    causal: bool,
    softmax_scale: float,
    dropout: float,
    deterministic: bool,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Calls the op in dynamic mode, or adds it to the program being built. Returns (out, softmax_lse)."""
    if paddle.in_dynamic_mode():
        if not paddle.is_grad_enabled():
            # Paddle records custom ops under no_grad too, which keeps every input alive: recompute would save nothing.
            query, key, value = (tensor.detach() for tensor in (query, key, value))
        if not _ONE_CALL_BUILDS_PROGRAMS:
            # Paddle 2.6 ends the process if it saves an absent input under recompute(..., use_reentrant=False).
            absent = paddle.empty([0], dtype="int32")
            optional = (startend_row_indices, block_mask, seed_offset)
            startend_row_indices, block_mask, seed_offset = (absent if t is None else t for t in optional)
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "startend_row_indices@OPTIONAL": startend_row_indices,
        "block_mask@OPTIONAL": block_mask,
        "seed_offset@OPTIONAL": seed_offset,
    }
    attributes = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "dropout": dropout,
        "deterministic": deterministic,
    }
    if paddle.in_dynamic_mode() or (_ONE_CALL_BUILDS_PROGRAMS and paddle.framework.in_dynamic_or_pir_mode()):
        out, lse = _run_custom_op(OP_NAME, *inputs.values(), *attributes.values())
        return out, lse
    return _append_to_program(inputs, attributes)


def _append_to_program(inputs: dict[str, Any], attributes: dict[str, Any]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Static programs of Paddle 2.6, and of Paddle 3 with FLAGS_enable_pir_api=0."""
    from paddle.base.layer_helper import LayerHelper

    helper = LayerHelper(OP_NAME)
    outputs = {
        "out": helper.create_variable_for_type_inference(inputs["query"].dtype),
        "softmax_lse": helper.create_variable_for_type_inference("float32"),
    }
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    helper.append_op(type=OP_NAME, inputs=given, outputs=outputs, attrs=attributes)
    return outputs["out"], outputs["softmax_lse"]


_load()
