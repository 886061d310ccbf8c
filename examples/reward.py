"""A reward model on packed rows: each prompt stored once for all its answers, with FlashMask or with a dense mask.

    python examples/reward.py examples/config/reward-tiny-cpu.json   # a small Llama on a laptop, both masks compared
    python examples/reward.py --model_name_or_path DIR --train_dataset_path data.json --flash_mask true --output_dir out

A decoder (Llama or Qwen2) with a score head learns the order of two or more answers to a prompt, by pairs or, with
--loss_type listwise, by whole lists. Arguments are PaddleNLP's (ModelConfig, TrainingArguments), those of the data
(PreferenceDataConfig) and the few below; a JSON file may hold them, and what follows it on the command line wins.
Without a model a small Llama starts from random weights. Without data it learns to rank four docstrings for a function
of Python's standard library: nothing is downloaded. --resume_from_checkpoint out/checkpoint-20 goes on from there.
"""

import quiet  # noqa: F401

# isort: split

import sys
from dataclasses import dataclass, field
from pathlib import Path

import paddle
from compare import compare
from margins import MarginWatch, evaluation, first_row_groups, report
from paddlenlp.trainer import PdArgumentParser
from paddlenlp.transformers import AutoConfig
from paddlenlp.transformers.configuration_utils import LlmMetaConfig
from paddlenlp.trl import ModelConfig
from preferences import write_preferences
from runs import new_folder
from sft import ExampleArguments, load_model, load_tokenizer

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class RewardExampleArguments(ExampleArguments, flashmask_nlp.VerifyArguments):
    """The arguments of sft.py, for the same decoder, --flash_mask_verify, and one to measure."""

    share_prompt: bool = field(
        default=True, metadata={"help": "False gives each answer a copy of its prompt, to see what sharing saves."}
    )


def parse_arguments() -> tuple:
    parser = PdArgumentParser(
        (
            ModelConfig,
            flashmask_nlp.PreferenceDataConfig,
            flashmask_nlp.AlignmentTrainingArguments,
            flashmask_nlp.RewardConfig,
            RewardExampleArguments,
        )
    )
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file_and_cmd_lines()
    return parser.parse_args_into_dataclasses()


def main() -> None:
    model_args, data_args, training_args, reward_args, example_args = parse_arguments()
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
            write_preferences(data, (0, 1, 2, 3), example_args.vocab_size, example_args.max_samples)
    if example_args.compare:
        files = {name: getattr(data_args, name) for name in ("train_dataset_path", "dev_dataset_path")}
        compare(__file__, sys.argv[1:], folder, {name: path for name, path in files.items() if path})
        return

    # 1. The flag, and a decoder with a score head: a causal language model's checkpoint gives the decoder.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    tokenizer = load_tokenizer(model_args, Path(data_args.train_dataset_path).with_name("tokenizer.json"))
    name = model_args.model_name_or_path
    if name:
        config = AutoConfig.from_pretrained(name)
    else:
        config = load_model(model_args, training_args, example_args, tokenizer, data_args.max_seq_len).config
    LlmMetaConfig.set_llm_config(config, training_args)  # use_flash_attention and recompute reach the model here
    paddle.seed(training_args.seed)
    model_class = flashmask_nlp.score_model_class(config)
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    model = model_class.from_pretrained(name, config=config, dtype=dtype) if name else model_class(config)
    if flash_mask:
        flashmask_nlp.check_model(model)

    # 2. Prompts with two or more answers each, packed; an answer sees its prompt and itself.
    def packed(path: str, strategy: str) -> flashmask_nlp.PreferenceDataset:
        samples = (flashmask_nlp.encode_preference(tokenizer, s) for s in flashmask_nlp.read_preferences(path))
        return flashmask_nlp.PreferenceDataset(
            samples,
            data_args.max_seq_len,
            "reward",
            strategy=strategy,
            too_long="skip",
            max_prompt_length=data_args.max_prompt_len,
            share_prompt=example_args.share_prompt,
        )

    dataset = packed(data_args.train_dataset_path, "greedy" if data_args.greedy_zero_padding else "in_order")
    eval_dataset = packed(data_args.dev_dataset_path, "greedy") if data_args.dev_dataset_path else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = "flashmask" if flash_mask else "dense"
    collator = flashmask_nlp.PreferenceCollator(data_args.max_seq_len, "reward", pad, mask)
    print(dataset.stats(), flush=True)

    # 3. PaddleNLP's Trainer with a loss over the answers of each prompt.
    watch = MarginWatch("FlashMask" if flash_mask else "dense mask", data_args.max_seq_len, "margin")
    verifying = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    trainer = flashmask_nlp.RewardTrainer(
        model=model,
        reward_config=reward_args,
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
    report("Reward model", folder, result)


if __name__ == "__main__":
    main()
