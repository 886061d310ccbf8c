"""One training run of one task with one mask: a process of its own, so that memory peaks do not mix.

Takes its settings as JSON from the command line and answers with a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import quiet  # noqa: F401

# isort: split

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
from paddlenlp.trl import DPOTrainer, SFTConfig, SFTTrainer
from paddlenlp.trl.llm_utils import get_lora_target_modules
from runs import Watch, memory_mib

import paddle_flashmask.paddlenlp as flashmask_nlp
from benchmarks.workloads import Case, documents

Mask = Literal["flashmask", "dense"]
TASKS = ("sft", "lora", "dpo", "reward")
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SEED = 42
ROWS = 5  # the official kernel benchmark has five samples of document lengths
ANSWERS = {"dpo": 2, "reward": 4}


class PlainTokenizer:
    """The trainers want a tokenizer; it is not asked for anything here."""

    pad_token_id = 0
    chat_template = None

    def save_pretrained(self, folder: str) -> None:
        return


def lengths(seqlen: int) -> list[list[int]]:
    """Document lengths of each row: the official kernel benchmark's, scaled to `seqlen`."""
    return documents(Case("causal_document", seqlen, 128, 1, ROWS, "float32"))


def tokens(random: np.random.Generator, size: int) -> list[int]:
    """Small numbers are frequent: there is something to learn."""
    return np.minimum(random.geometric(0.01, size), MODEL["vocab_size"] - 1).tolist()


def pairs(seqlen: int) -> list[dict[str, list[int]]]:
    """Documents for SFT; the second half of each is learned."""
    random = np.random.default_rng(SEED)
    made = []
    for size in itertools.chain.from_iterable(lengths(seqlen)):
        drawn = tokens(random, size + 1)
        made.append({"input_ids": drawn[:-1], "labels": [-100] * (size // 2) + drawn[size // 2 + 1 :]})
    return made


def preferences(seqlen: int, answers: int) -> list[dict[str, Any]]:
    """The same documents, divided into a prompt and answers of 10 to 20% of its length, as the paper does."""
    random = np.random.default_rng(SEED)
    made = []
    for size in itertools.chain.from_iterable(lengths(seqlen)):
        shares = random.uniform(0.1, 0.2, answers)
        sizes = np.maximum(1, size * shares / (1 + shares.sum())).astype(int)
        responses = [tokens(random, answer) for answer in sizes]
        prompt = tokens(random, size - int(sizes.sum()))
        made.append({"prompt": prompt, "responses": responses, "sort": list(range(answers, 0, -1))})
    return made


def make_trainer(task: str, mask: Mask, seqlen: int, steps: int, folder: str, callback: Any) -> Any:
    settings = {
        "output_dir": folder,
        "device": "cpu",
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": ["none"],
        "seed": SEED,
    }
    (flashmask_nlp.enable if mask == "flashmask" else flashmask_nlp.disable)()
    paddle.seed(SEED)
    config = LlamaConfig(**MODEL, max_position_embeddings=seqlen, use_flash_attention=mask == "flashmask")
    model = (flashmask_nlp.LlamaForScore if task == "reward" else LlamaForCausalLM)(config)
    common = {"tokenizer": PlainTokenizer(), "callbacks": [callback]}
    if task in ("sft", "lora"):
        if task == "lora":
            model = LoRAModel(model, LoRAConfig(target_modules=get_lora_target_modules(model), r=8, lora_alpha=16))
            model.mark_only_lora_as_trainable()
        rows = flashmask_nlp.PackedDataset(pairs(seqlen), seqlen, "in_order")
        common |= {"train_dataset": rows, "data_collator": flashmask_nlp.PackingCollator(seqlen, mask=mask)}
        return SFTTrainer(model=model, args=SFTConfig(**settings), **common)
    kind: Literal["dpo", "reward"] = "dpo" if task == "dpo" else "reward"
    rows = flashmask_nlp.PreferenceDataset(preferences(seqlen, ANSWERS[task]), seqlen, kind, strategy="in_order")
    common |= {"train_dataset": rows, "data_collator": flashmask_nlp.PreferenceCollator(seqlen, kind, mask=mask)}
    args = flashmask_nlp.AlignmentTrainingArguments(**settings)
    if task == "reward":
        return flashmask_nlp.RewardTrainer(model=model, args=args, **common)
    reference = flashmask_nlp.reference_model(model)
    return DPOTrainer(model=model, ref_model=reference, dpo_config=flashmask_nlp.DPOConfig(), args=args, **common)


def run(task: str, mask: Mask, seqlen: int, steps: int) -> dict[str, Any]:
    """Seconds of every step after the first, losses of all, and memory in MiB: of the process before training, and at
    the peak of the steps after the first over that."""
    watch = Watch(mask, seqlen)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, mask, seqlen, steps, folder, watch)
        if len(trainer.train_dataset) != ROWS:
            raise RuntimeError(f"{ROWS} rows were expected, got {len(trainer.train_dataset)}")
        stats = trainer.train_dataset.stats()
        trainer.train()
    return {
        "step_seconds": [round(seconds, 4) for seconds in np.diff(watch.step_ends).tolist()],
        "losses": watch.losses,
        "before_training_mib": round(watch.before_training, 1),
        "training_mib": round(memory_mib("VmHWM") - watch.before_training, 1),
        "attended": round(stats.attended, 4),
        "fill": round(stats.fill, 4),
    }


def main() -> None:
    # The progress bar must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(run(**json.loads(sys.argv[1]))), file=answer, flush=True)


if __name__ == "__main__":
    main()
