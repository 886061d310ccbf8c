"""Direct preference optimization (DPO) with PaddleNLP's own DPOTrainer: each prompt stored once for its two answers.

    python examples/dpo.py examples/config/dpo-tiny-cpu.json         # a small Llama on a laptop, both masks compared
    python examples/dpo.py --model_name_or_path DIR --train_dataset_path train.json --flash_mask true --output_dir out

Arguments are PaddleNLP's (ModelConfig, with --lora true for adapters; TrainingArguments), those of the data and of the
loss (PreferenceDataConfig, DPOConfig) and the few below; a JSON file may hold them, and what follows it on the command
line wins. --reference_free true trains without a reference model. Without a model a small Llama starts from random
weights. Without data it learns to prefer a function's own docstring (Python's standard library) to another one: nothing
is downloaded. --resume_from_checkpoint out/checkpoint-20 goes on where that run stopped.
"""

import quiet  # noqa: F401

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path

from compare import compare
from margins import MarginWatch, evaluation, first_row_groups, report
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trainer import PdArgumentParser
from paddlenlp.trl import DPOTrainer, ModelConfig
from paddlenlp.trl.llm_utils import get_lora_target_modules
from preferences import write_preferences
from runs import new_folder
from sft import ExampleArguments, load_model, load_tokenizer

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class DPOExampleArguments(ExampleArguments, flashmask_nlp.VerifyArguments):
    """The arguments of sft.py, for the same model, and --flash_mask_verify."""


def parse_arguments() -> tuple:
    parser = PdArgumentParser(
        (
            ModelConfig,
            flashmask_nlp.PreferenceDataConfig,
            flashmask_nlp.AlignmentTrainingArguments,
            flashmask_nlp.DPOConfig,
            DPOExampleArguments,
        )
    )
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file_and_cmd_lines()
    return parser.parse_args_into_dataclasses()


def add_adapters(model_args: ModelConfig, model: object) -> LoRAModel:
    if model_args.lora_path:
        model = LoRAModel.from_pretrained(model, model_args.lora_path)
    else:
        rank = model_args.lora_rank
        model = LoRAModel(
            model,
            LoRAConfig(
                target_modules=get_lora_target_modules(model), r=rank, lora_alpha=2 * rank, dtype=model.config.dtype
            ),
        )
    model.mark_only_lora_as_trainable()
    return model


def main() -> None:
    model_args, data_args, training_args, dpo_args, example_args = parse_arguments()
    folder = Path(training_args.output_dir)
    if training_args.resume_from_checkpoint is None:
        folder = new_folder(folder)
        training_args.output_dir = str(folder)
    if data_args.train_dataset_path is None:
        data = folder / "data"
        data_args.train_dataset_path = str(data / "preferences.json")
        data_args.dev_dataset_path = str(data / "preferences-dev.json")
        if not data.exists():
            print("Reading functions and docstrings of Python's standard library", flush=True)
            write_preferences(data, (0, 3), example_args.vocab_size, example_args.max_samples)
    if example_args.compare:
        files = {name: getattr(data_args, name) for name in ("train_dataset_path", "dev_dataset_path")}
        compare(__file__, sys.argv[1:], folder, {name: path for name, path in files.items() if path})
        return

    # 1. The flag, the policy, and the model it is held to: a frozen copy, or itself without its adapters.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    tokenizer = load_tokenizer(model_args, Path(data_args.train_dataset_path).with_name("tokenizer.json"))
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_seq_len)
    reference = None
    dpo_args.lora = model_args.lora
    if model_args.lora:
        model = add_adapters(model_args, model)
    elif not dpo_args.reference_free:
        reference = flashmask_nlp.reference_model(model)
    if flash_mask:
        flashmask_nlp.check_model(model)

    # 2. Prompts with two answers each, packed; an answer sees its prompt and itself.
    def packed(path: str, strategy: str) -> flashmask_nlp.PreferenceDataset:
        samples = (flashmask_nlp.encode_preference(tokenizer, s) for s in flashmask_nlp.read_preferences(path, 2))
        return flashmask_nlp.PreferenceDataset(
            samples,
            data_args.max_seq_len,
            "dpo",
            strategy=strategy,
            too_long="skip",
            max_prompt_length=data_args.max_prompt_len,
        )

    dataset = packed(data_args.train_dataset_path, "greedy" if data_args.greedy_zero_padding else "in_order")
    eval_dataset = packed(data_args.dev_dataset_path, "greedy") if data_args.dev_dataset_path else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = "flashmask" if flash_mask else "dense"
    collator = flashmask_nlp.PreferenceCollator(data_args.max_seq_len, "dpo", pad, mask)
    print(dataset.stats(), flush=True)

    # 3. PaddleNLP's trainer, untouched.
    watch = MarginWatch("FlashMask" if flash_mask else "dense mask", data_args.max_seq_len, "rewards/margins")
    verifying = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        dpo_config=dpo_args,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=[watch, *verifying],
    )
    before = evaluation(trainer.evaluate()) if eval_dataset else None
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = evaluation(trainer.evaluate()) if eval_dataset else None
    if training_args.save_strategy.value != "no":
        trainer.save_model()
    result = {
        **watch.result(),
        "mask": mask,
        "evaluation": {"before": before, "after": after} if eval_dataset else None,
        "first_row_groups": first_row_groups(dataset),
        "tokens_saved": 1 - dataset.stats().tokens / dataset.stats().unshared_tokens,
    }
    report("DPO", folder, result)


if __name__ == "__main__":
    main()
