"""Direct preference optimization (DPO) with PaddleNLP's own DPOTrainer: each prompt stored once for its two answers.

    python examples/dpo.py examples/config/dpo-tiny-cpu.json         # a small Llama on a laptop, both masks compared
    python examples/dpo.py --model_name_or_path DIR --train_dataset_path train.json --flash_mask true --output_dir out

Arguments are PaddleNLP's (ModelConfig, with --lora true for adapters; TrainingArguments), those of the data and of the
loss (PreferenceDataConfig, DPOConfig) and the few of examples/sft.py; a JSON file may hold them, and what follows it on
the command line wins. --reference_free true trains without a reference model. Without a model a small Llama starts from
random weights. Without data it learns to prefer a function's own docstring (Python's standard library) to another one:
nothing is downloaded. --resume_from_checkpoint out/checkpoint-20 goes on where that run stopped.
"""

import quiet  # noqa: F401

# isort: split

import sys
from typing import Literal

from adapters import add_adapters, check_checkpoint
from compare import compare
from paddlenlp.trl import DPOTrainer, ModelConfig
from preferences import preference_files
from reports import MASKS, report
from rows import first_row_groups, longest_sample, packed_preferences
from runs import MarginWatch, check_steps, parse, run_folder, train
from sft import ExampleArguments, load_model, load_tokenizer

import paddle_flashmask.paddlenlp as flashmask_nlp


def parse_arguments() -> tuple:
    return parse(
        ModelConfig,
        flashmask_nlp.PreferenceDataConfig,
        flashmask_nlp.AlignmentTrainingArguments,
        flashmask_nlp.DPOConfig,
        ExampleArguments,
    )


def main() -> None:
    model_args, data_args, training_args, dpo_args, example_args = parse_arguments()
    dpo_args.lora = bool(model_args.lora or model_args.lora_path)
    flashmask_nlp.check_reference_updates(dpo_args, training_args)
    if dpo_args.lora:
        check_checkpoint(model_args, training_args.resume_from_checkpoint)
    folder = run_folder(training_args, example_args.compare)
    files = preference_files(folder, data_args, example_args, ranks=(0, 3))
    if example_args.compare:
        compare(__file__, sys.argv[1:], folder, files)
        return

    # 1. The flag.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    mask: Literal["flashmask", "dense"] = "flashmask" if flash_mask else "dense"

    # 2. Prompts with two answers each, packed; an answer sees its prompt and itself. Before the models, so that a
    # mistake in the data shows early.
    tokenizer = load_tokenizer(model_args, data_args.train_dataset_path)
    dataset, eval_dataset, collator = packed_preferences(tokenizer, data_args, example_args, "dpo", mask)
    check_steps(training_args, dataset)

    # 3. The policy, and the model it is held to: a frozen copy, or itself without its adapters.
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_seq_len)
    reference = None
    if dpo_args.lora:
        model = add_adapters(model, model_args)
    elif not dpo_args.reference_free:
        reference = flashmask_nlp.reference_model(model)
    if flash_mask:
        flashmask_nlp.check_model(model)
    flashmask_nlp.check_positions(model, longest_sample(dataset, eval_dataset))

    # 4. PaddleNLP's trainer, untouched.
    watch = MarginWatch(MASKS[mask], data_args.max_seq_len, "rewards/margins")
    checks = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        dpo_config=dpo_args,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=[watch, *checks],
    )
    result = {**train(trainer, watch), "mask": mask, "first_row_groups": first_row_groups(dataset)}
    result["tokens_saved"] = dataset.stats().tokens_saved
    report("DPO", folder, result)


if __name__ == "__main__":
    main()
