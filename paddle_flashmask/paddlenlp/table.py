"""What is replaced in PaddleNLP."""

from __future__ import annotations

from . import carried, guards, routing, workarounds
from .carried_table import DROPS_MASK, carried_patches
from .families import FAMILIES
from .patching import Patch

__all__ = ["patches"]

_TRANSFORMERS = "paddlenlp.transformers"


def patches() -> list[Patch]:
    """Every replacement, in the order in which it is made."""
    table = [
        Patch(
            f"{_TRANSFORMERS}.llama.fusion_ops:fusion_flash_attention",
            routing.route,
            "row indices have no CPU kernel, and a dense mask is ignored by Paddle 3.3 where is_causal=True",
        ),
        Patch(
            f"{_TRANSFORMERS}.qwen.modeling:QWenModel.forward",
            guards.guard_model,
            "USE_CASUAL_MASK=True drops the attention mask",
        ),
        Patch(
            f"{_TRANSFORMERS}.refined_recompute:switch_rng_state_tracker",
            workarounds.rng_tracker,
            "refined recompute fails: Paddle 3.1 added two arguments",
            workarounds.rng_tracker_wants_more,
        ),
        Patch(
            "paddlenlp.trl.dpo_trainer:prepare_pipeline_dpo_inputs_func",
            workarounds.dpo_pipeline_inputs,
            "DPO with pipeline parallelism drops the row indices: a misspelt key",
        ),
        Patch(
            "paddlenlp.trl.dpo_trainer:DPOTrainer._wrap_ref_model",
            workarounds.lone_reference,
            "DPO with a reference model fails in a single process: Paddle 3.3.1 wants fleet to be initialised",
            workarounds.fleet_must_be_initialised,
        ),
        Patch(
            "paddlenlp.trl.dpo_trainer:DPOTrainer.__init__",
            guards.guard_dpo_layout,
            "ignore_eos_token=True drops a token of every rejected answer of a PreferenceCollator",
        ),
        Patch(
            "paddlenlp.trainer.trainer:Trainer.train",
            guards.guard_reference_updates,
            "DPO's updates of the reference model are lost when resumed, and counted in batches instead of steps",
        ),
        Patch(
            "paddlenlp.transformers.dpo_criterion:DPOCriterion.dpo_logps",
            workarounds.all_chosen_tokens,
            "the SFT loss of DPO is divided by too few tokens where a chosen answer holds token 0",
        ),
        Patch(
            "paddlenlp.trl.sft_trainer:SFTTrainer.prediction_step",
            guards.guard_generation,
            "evaluation with generation drops the row indices",
        ),
        Patch(
            "paddlenlp.trainer.trainer:Trainer._prepare_inputs",
            guards.guard_prepared_inputs,
            "a model with **kwargs swallows row indices",
        ),
        Patch(
            "paddlenlp.generation.utils:GenerationMixin.generate",
            guards.guard_generate,
            "generate ignores row indices",
        ),
    ]
    for trainer in ("dpo_trainer:DPOTrainer", "kto_trainer:KTOTrainer"):
        table.append(
            Patch(
                f"paddlenlp.trl.{trainer}.get_batch_metrics",
                guards.guard_preference_batch,
                "row indices are dropped beside an attention mask",
            )
        )
    for name in ("split_inputs_sequence_dim", "split_inputs_sequence_dim_load_balance"):
        table.append(
            Patch(
                f"paddlenlp.trainer.trainer:{name}",
                guards.guard_sequence_split,
                "a mask that is cut along the sequence no longer fits the attention that runs over all of it",
            )
        )
    for name in ("moe_gate", "moe_gate_auto"):
        table.append(
            Patch(
                f"{_TRANSFORMERS}.{name}:PretrainedMoEGate._priority",
                workarounds.expert_slots,
                "the expert gate fails: Paddle 3.2's cumsum of int32 gives int64",
                workarounds.cumsum_promotes_int32,
            )
        )
    for folder, prefix in FAMILIES.items():
        guard_model = carried.guard_shared_model if folder == "deepseek_v2" else guards.guard_model
        table += [
            Patch(
                f"{_TRANSFORMERS}.{folder}.modeling:{prefix}Model.forward",
                guard_model,
                "USE_CASUAL_MASK=True drops the attention mask; alibi is left out beside row indices",
            ),
            Patch(
                f"{_TRANSFORMERS}.{folder}.modeling:{prefix}Attention.forward",
                guards.guard_attention,
                "use_flash_attention=False ignores row indices",
            ),
            Patch(f"{_TRANSFORMERS}.{folder}.modeling:is_casual_mask", guards.exactly_causal, DROPS_MASK),
            Patch(
                f"{_TRANSFORMERS}.{folder}.modeling_pp:parse_args",
                workarounds.pipeline_arguments,
                "pipeline stages mix up masks, row indices and position ids",
            ),
        ]
        refined = ("rr_recompute",) if folder in ("llama", "qwen2") else ()
        table += [
            Patch(
                f"{_TRANSFORMERS}.{folder}.{file}:{name}",
                carried.carry_through_recompute,
                "recomputation would attend otherwise than the forward pass where the routing is switched off between",
            )
            for file in ("modeling", "modeling_pp")
            for name in ("recompute", *refined)
        ]
    return table + carried_patches()
