"""The ``--flash_mask`` argument of PaddleNLP's ``ModelConfig``, made to work."""

from __future__ import annotations

import logging
from typing import Any

import paddle

from ._common import drops_masks_by_environment
from .families import MODELS
from .guards import ROW_INDICES, accepts_row_indices
from .switch import enable, expect_row_indices

__all__ = ["check_model", "enable_from_args"]

logger = logging.getLogger(__name__)


def _flag(args: Any, name: str, default: Any = None) -> Any:
    return getattr(args, name, default) if args is not None else default


def _device(training_args: Any) -> str:
    return str(_flag(training_args, "device", "") or paddle.get_device()).split(":")[0]


def _contradictions(model_args: Any, training_args: Any) -> list[str]:
    """What ``--flash_mask true`` cannot be combined with, each with the change to make."""
    found = []
    for name in ("context_parallel_degree", "sep_parallel_degree"):
        degree = _flag(training_args, name, 1)
        if degree is not None and degree > 1:
            found.append(
                f"--{name} {degree}: PaddleNLP trains plain causal attention, or fails, with row indices there. "
                f"Use --{name} 1 (tensor and pipeline parallelism work)"
            )
    if _flag(training_args, "use_ssa", False):
        found.append("--use_ssa true: shifted sparse attention ignores row indices. Use --use_ssa false")
    if _flag(training_args, "enable_auto_parallel", False):
        found.append("--enable_auto_parallel true: those models take no row indices. Use --enable_auto_parallel false")
    if _flag(model_args, "prefix_tuning", False):
        found.append("--prefix_tuning true: the prefix adds keys that row indices do not describe. Use --lora true")
    device = _device(training_args)
    if device not in ("cpu", "gpu"):
        found.append(f"--device {device}: PaddleNLP ignores row indices there. Use --device gpu or --device cpu")
    return found


def enable_from_args(model_args: Any, training_args: Any, model: Any = None) -> bool:
    """Do what ``--flash_mask`` asks for: call it after parsing the arguments and before building the model.

    With ``flash_mask=True`` it enables the routing and sets ``training_args.use_flash_attention=True``, which
    ``LlmMetaConfig.set_llm_config(model_config, training_args)`` hands to the model. The batches must carry
    ``attn_mask_startend_row_indices``, for instance from ``PackingCollator(mask="flashmask")``.

    Args:
        model_args: PaddleNLP's ``ModelConfig``, or anything with a ``flash_mask`` attribute.
        training_args: ``SFTConfig``, ``TrainingArguments``, ...
        model: the model, if it is built already; see ``check_model``.

    Returns:
        Whether FlashMask is on, so that the data can be prepared for it.

    Raises:
        TypeError: ``model_args`` has no ``flash_mask``.
        ValueError: a setting that contradicts ``flash_mask``, or that trains with the wrong mask without it. All
            contradictions are named in one message.
    """
    if not hasattr(model_args, "flash_mask"):
        raise TypeError(f"model_args must have flash_mask, as PaddleNLP's ModelConfig; got {type(model_args).__name__}")
    if not model_args.flash_mask:
        _check_dense(training_args)
        return False
    contradictions = _contradictions(model_args, training_args)
    if contradictions:
        raise ValueError("--flash_mask true contradicts\n  " + "\n  ".join(contradictions))
    enable()
    expect_row_indices()
    if not _flag(training_args, "use_flash_attention", False):
        logger.info("--flash_mask true sets --use_flash_attention true")
        training_args.use_flash_attention = True
    if model is not None:
        check_model(model)
    return True


def _reaches_flash_attn(device: str, training_args: Any) -> bool:
    """Whether Paddle 3.3 takes its flash attention, the only one of its kernels that gets the mask there."""
    if device != "gpu" or not (_flag(training_args, "bf16", False) or _flag(training_args, "fp16", False)):
        return False
    return not paddle.is_compiled_with_cuda() or paddle.device.cuda.get_device_capability() >= (8, 0)


def _check_dense(training_args: Any) -> None:
    from .routing import ROUTED_DEVICES, drops_dense_mask

    # PaddleNLP looks at it whatever use_flash_attention says, and enable() is not called here: no guard will see it.
    # For rows of one sample each it is right, so it is refused only where samples are packed (the collators).
    if drops_masks_by_environment():
        logger.warning(
            "USE_CASUAL_MASK=True in the environment without --flash_mask: PaddleNLP ignores attention masks then and "
            "trains plain causal attention, across the samples of packed rows. Unset USE_CASUAL_MASK for those, or use "
            "--flash_mask true"
        )
    if not _flag(training_args, "use_flash_attention", False):
        return
    device = _device(training_args)
    if device in ROUTED_DEVICES and not _reaches_flash_attn(device, training_args) and drops_dense_mask():
        where, instead = "on the CPU", ""
        if device != "cpu":
            where = "on a GPU in float32 or below compute capability 8.0"
            instead = ", or --bf16 true on a GPU of 8.0 or above"
        raise ValueError(
            f"--use_flash_attention true without --flash_mask {where}: Paddle {paddle.__version__} ignores the "
            "dense attention mask there and trains plain causal attention. Use --flash_mask true, or "
            f"--use_flash_attention false{instead}"
        )


def check_model(model: Any) -> None:
    """Check that a model (or a LoRA wrapper of one) can train with row indices.

    Raises:
        ValueError: its forward takes none, ``use_flash_attention`` is off in its config, or it uses alibi.
    """
    if not accepts_row_indices(model):
        raise ValueError(
            f"{type(model).__name__} does not take {ROW_INDICES}. With PaddleNLP 3.0.0b4 these do: {', '.join(MODELS)}"
        )
    config = getattr(model, "config", None)
    if config is not None and not getattr(config, "use_flash_attention", False):
        raise ValueError(
            f"{type(model).__name__} was built with use_flash_attention=False and would ignore {ROW_INDICES}. Call "
            "LlmMetaConfig.set_llm_config(model_config, training_args) between enable_from_args and building the model"
        )
    if config is not None and getattr(config, "alibi", False):
        raise ValueError(f"{type(model).__name__} uses alibi, which PaddleNLP leaves out beside {ROW_INDICES}")
