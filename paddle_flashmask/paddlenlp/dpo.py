"""What PaddleNLP's DPOTrainer needs and its wheel lacks: the arguments, and a frozen reference model.

DPO: Rafailov et al., arXiv 2305.18290. The field names are those of PaddleNLP's own scripts, so their JSON files work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Optional

__all__ = ["DPOConfig", "PreferenceDataConfig", "check_reference_updates", "reference_model"]

LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair", "dpop", "or", "simpo")
WITHOUT_REFERENCE = ("or", "simpo")  # DPOTrainer refuses a reference model for these,
NEEDS_REFERENCE = ("kto_pair", "sppo_hard", "nca_pair", "dpop")  # and the lack of one for these


@dataclass
class DPOConfig:
    """Arguments of the loss, for ``PdArgumentParser`` and ``DPOTrainer(dpo_config=...)``.

    ``lora`` is no argument of its own (``ModelConfig`` has one): set it to ``model_args.lora`` after parsing. The LoRA
    model without its adapters is then the reference.

    Raises:
        ValueError: an unknown ``loss_type``, or values that contradict each other or are out of range; also when
            ``lora`` is set beside ``ref_model_update_steps``.
    """

    beta: float = field(default=0.1, metadata={"help": "Temperature of the loss: small values allow large changes."})
    loss_type: str = field(default="sigmoid", metadata={"help": f"orpo, or one of {', '.join(LOSSES)}."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of wrong labels, from 0 to 0.5."})
    pref_loss_ratio: float = field(default=1.0, metadata={"help": "Factor of the preference loss."})
    sft_loss_ratio: float = field(default=0.0, metadata={"help": "Factor of the SFT loss on the chosen answers."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of SimPO."})
    dpop_lambda: float = field(default=50.0, metadata={"help": "Factor of DPOP's penalty."})
    ref_model_update_steps: int = field(
        default=-1, metadata={"help": "Copy the policy into the reference model every so many steps; -1 never does."}
    )
    reference_free: bool = field(default=False, metadata={"help": "Train without a reference model."})
    lora: bool = field(default=False, init=False)

    def __setattr__(self, name: str, value: Any) -> None:
        # Set after __post_init__. PaddleNLP would train until the first update, and fail there.
        if name == "lora" and value:
            self._require_reference_model("lora is True: the reference is the policy without its adapters")
        super().__setattr__(name, value)

    def _require_reference_model(self, reason: str) -> None:
        if self.ref_model_update_steps > 0:
            raise ValueError(
                f"ref_model_update_steps must be -1 without a reference model of its own, got "
                f"{self.ref_model_update_steps}, but {reason}"
            )

    def __post_init__(self) -> None:
        if self.loss_type == "orpo":  # as PaddleNLP's scripts define it
            self.loss_type, self.reference_free, self.sft_loss_ratio = "or", True, 1.0
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be orpo or one of {', '.join(LOSSES)}, got {self.loss_type!r}")
        if self.loss_type in WITHOUT_REFERENCE:
            self.reference_free = True
        if self.reference_free and self.loss_type in NEEDS_REFERENCE:
            raise ValueError(f"loss_type={self.loss_type!r} needs a reference model, but reference_free is True")
        if self.reference_free:
            self._require_reference_model(f"reference_free is True (loss_type={self.loss_type!r})")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing must be from 0 to 0.5, got {self.label_smoothing}")


def check_reference_updates(dpo_config: Any, training_args: Any, resume_from_checkpoint: Any = None) -> None:
    """Check that ``ref_model_update_steps`` can do what it says in this run, before anything is loaded.

    While the routing is on, ``DPOTrainer.train`` checks it itself.

    Raises:
        ValueError: updates together with ``resume_from_checkpoint`` (of the argument or of ``training_args``) or with
            ``gradient_accumulation_steps`` above 1.
    """
    steps = getattr(dpo_config, "ref_model_update_steps", -1)
    if steps <= 0:
        return
    checkpoint = resume_from_checkpoint or getattr(training_args, "resume_from_checkpoint", None)
    if checkpoint:
        raise ValueError(
            f"ref_model_update_steps must be -1 with resume_from_checkpoint, got {steps} and {checkpoint}: checkpoints "
            "hold no reference model, so that the run would go on against another one than it stopped with"
        )
    accumulated = getattr(training_args, "gradient_accumulation_steps", 1)
    if accumulated > 1:
        raise ValueError(
            f"ref_model_update_steps must be -1 with gradient_accumulation_steps above 1, got {steps} and "
            f"{accumulated}: PaddleNLP counts batches as steps there, and would update the reference model too often, "
            "between the batches of a step, too"
        )


@dataclass
class PreferenceDataConfig:
    """Arguments of the data for DPO and reward models, for ``PdArgumentParser``."""

    # PdArgumentParser does not know `str | None`.
    train_dataset_path: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "File for training, see read_preferences."}
    )
    dev_dataset_path: Optional[str] = field(default=None, metadata={"help": "File for evaluation."})  # noqa: UP045
    max_seq_len: int = field(default=4096, metadata={"help": "Tokens of a row; a prompt and its answers must fit."})
    max_prompt_len: int = field(default=2048, metadata={"help": "Tokens of a prompt; longer ones are left out."})
    greedy_zero_padding: bool = field(
        default=False, metadata={"help": "Fill the rows better, instead of keeping the order of the file."}
    )

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_prompt_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def reference_model(model: Any) -> Any:
    """A frozen copy of ``model`` as it is now, for ``DPOTrainer(ref_model=...)``.

    It keeps weights of its own, with the same dtype and configuration. Nothing of it is trained or saved.

    Raises:
        TypeError: ``model`` is a LoRA model, which needs none: set ``DPOConfig.lora`` instead.
    """
    from paddlenlp.peft import LoRAModel

    if isinstance(model, LoRAModel):
        raise TypeError("model is a LoRAModel, whose reference is itself without adapters: set dpo_config.lora = True")
    frozen = copy.deepcopy(model)
    frozen.eval()
    for parameter in frozen.parameters():
        parameter.stop_gradient = True
    return frozen
