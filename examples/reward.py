"""A reward model on packed rows: each prompt stored once for all its answers, with FlashMask or with a dense mask.

    python examples/reward.py examples/config/reward-tiny-cpu.json   # a small Llama on a laptop, both masks compared
    python examples/reward.py --model_name_or_path DIR --train_dataset_path data.json --flash_mask true --output_dir out

A decoder (Llama or Qwen2) with a score head learns the order of two or more answers to a prompt, by pairs or, with
--loss_type listwise, by whole lists. Arguments are PaddleNLP's (ModelConfig, with --lora true for adapters;
TrainingArguments), those of the data (PreferenceDataConfig), the few of examples/sft.py and --share_prompt; a JSON file
may hold them, and what follows it on the command line wins. Without a model a small Llama starts from random weights.
Without data it learns to rank four docstrings for a function of Python's standard library: nothing is downloaded.
--resume_from_checkpoint out/checkpoint-20 goes on from there.
"""

import quiet  # noqa: F401

# isort: split

import sys
from dataclasses import dataclass, field
from typing import Literal

import paddle
from adapters import add_adapters, check_checkpoint
from compare import compare
from paddlenlp.transformers import AutoConfig
from paddlenlp.transformers.configuration_utils import LlmMetaConfig
from paddlenlp.trl import ModelConfig
from preferences import preference_files
from reports import MASKS, report
from rows import first_row_groups, longest_sample, packed_preferences
from runs import MarginWatch, check_steps, parse, run_folder, train
from sft import ExampleArguments, load_tokenizer, small_config

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class RewardExampleArguments(ExampleArguments):
    share_prompt: bool = field(
        default=True, metadata={"help": "False gives each answer a copy of its prompt, to see what sharing saves."}
    )


def parse_arguments() -> tuple:
    return parse(
        ModelConfig,
        flashmask_nlp.PreferenceDataConfig,
        flashmask_nlp.AlignmentTrainingArguments,
        flashmask_nlp.RewardConfig,
        RewardExampleArguments,
    )


def main() -> None:
    model_args, data_args, training_args, reward_args, example_args = parse_arguments()
    if model_args.lora or model_args.lora_path:
        check_checkpoint(model_args, training_args.resume_from_checkpoint)
    folder = run_folder(training_args, example_args.compare)
    files = preference_files(folder, data_args, example_args, ranks=(0, 1, 2, 3))
    if example_args.compare:
        compare(__file__, sys.argv[1:], folder, files)
        return

    # 1. The flag.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    mask: Literal["flashmask", "dense"] = "flashmask" if flash_mask else "dense"

    # 2. Prompts with two or more answers each, packed; an answer sees its prompt and itself. Before the model, so that
    # a mistake in the data shows early.
    tokenizer = load_tokenizer(model_args, data_args.train_dataset_path)
    dataset, eval_dataset, collator = packed_preferences(
        tokenizer, data_args, example_args, "reward", mask, example_args.share_prompt
    )
    check_steps(training_args, dataset)

    # 3. A decoder with a score head: a causal language model's checkpoint gives the decoder.
    name = model_args.model_name_or_path
    small = small_config(example_args, tokenizer, data_args.max_seq_len)
    config = AutoConfig.from_pretrained(name) if name else small
    LlmMetaConfig.set_llm_config(config, training_args)  # use_flash_attention and recompute reach the model here
    paddle.seed(training_args.seed)
    model_class = flashmask_nlp.score_model_class(config)
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    model = model_class.from_pretrained(name, config=config, dtype=dtype) if name else model_class(config)
    if model_args.lora or model_args.lora_path:
        # The head is new, so that it is trained itself.
        model = add_adapters(model, model_args, also_trained=[".*score_head.*"])
    if flash_mask:
        flashmask_nlp.check_model(model)
    flashmask_nlp.check_positions(model, longest_sample(dataset, eval_dataset))

    # 4. PaddleNLP's Trainer with a loss over the answers of each prompt.
    watch = MarginWatch(MASKS[mask], data_args.max_seq_len, "margin")
    checks = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    trainer = flashmask_nlp.RewardTrainer(
        model=model,
        reward_config=reward_args,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=[watch, *checks],
    )
    result = {**train(trainer, watch), "mask": mask, "first_row_groups": first_row_groups(dataset)}
    result["tokens_saved"] = dataset.stats().tokens_saved
    report("Reward model", folder, result)


if __name__ == "__main__":
    main()
