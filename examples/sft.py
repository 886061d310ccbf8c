"""Supervised fine-tuning (SFT) with PaddleNLP's own SFTTrainer on packed rows, with FlashMask or with a dense mask.

    python examples/sft.py examples/config/sft-tiny-cpu.json         # a small Llama on a laptop, both masks compared
    python examples/sft.py --model_name_or_path DIR --dataset_name_or_path train.json --flash_mask true --output_dir out

Arguments are PaddleNLP's (ModelConfig, DataConfig, SFTConfig) and the few below; a JSON file may hold them, and what
follows it on the command line wins. Without a model a small Llama starts from random weights. Without data the model
learns what the functions of Python's standard library do, from their docstrings: nothing is downloaded.
--resume_from_checkpoint out/checkpoint-20 goes on where that run stopped.
"""

import quiet  # noqa: F401

# isort: split

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import paddle
from compare import compare
from corpus import write_corpus
from paddlenlp.transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedTokenizerFast,
)
from paddlenlp.transformers.configuration_utils import LlmMetaConfig
from paddlenlp.trl import DataConfig, ModelConfig, SFTConfig, SFTTrainer
from reports import MASKS, report
from rows import longest_sample, packed_pairs
from runs import Watch, check_steps, parse, run_folder, train

import paddle_flashmask.paddlenlp as flashmask_nlp

# How the names of classes end whose checkpoints lack the language model head; score models are examples/reward.py's.
OTHER_HEADS = ("ForScore", "RewardModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass
class ExampleArguments(flashmask_nlp.VerifyArguments):
    compare: bool = field(default=False, metadata={"help": "Train with FlashMask and with a dense mask, and compare."})
    max_samples: int = field(
        default=0,
        metadata={"help": "Use the first so many samples of a file; 0 is all, without data thousands of docstrings."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer that is trained, without a model."})
    hidden_size: int = field(default=256, metadata={"help": "Of the random Llama, without a model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Of the random Llama, without a model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Of the random Llama, without a model."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Of the random Llama, without a model."})

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise ValueError(f"max_samples must be 0 (all) or more, got {self.max_samples}")


@dataclass
class PairArguments(ExampleArguments):
    eval_every: int = field(
        default=20, metadata={"help": "Keep every so many-th sample for evaluation; 0 keeps none. dev.json is better."}
    )


def parse_arguments() -> tuple[ModelConfig, DataConfig, SFTConfig, PairArguments]:
    return parse(ModelConfig, DataConfig, SFTConfig, PairArguments)


def load_tokenizer(model_args: ModelConfig, data: str) -> PretrainedTokenizerFast:
    name = model_args.tokenizer_name_or_path or model_args.model_name_or_path
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except OSError as error:
            hint = "expected a folder with a checkpoint and its tokenizer, or, with HF_HUB_OFFLINE=0, a name on a hub"
            raise OSError(f"--model_name_or_path {name}: {hint}. {error}") from error
    file = (Path(data) if Path(data).is_dir() else Path(data).parent) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"without --model_name_or_path the tokenizer must lie beside the data: there is no {file}"
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PretrainedTokenizerFast(tokenizer_file=str(file), **special)


def small_config(example_args: ExampleArguments, tokenizer: PretrainedTokenizerFast, length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=example_args.hidden_size,
        intermediate_size=example_args.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=example_args.num_hidden_layers,
        num_attention_heads=example_args.num_attention_heads,
        num_key_value_heads=example_args.num_key_value_heads,
        max_position_embeddings=length,
    )


def load_model(
    model_args: ModelConfig,
    training_args: SFTConfig,
    example_args: ExampleArguments,
    tokenizer: PretrainedTokenizerFast,
    length: int,
) -> LlamaForCausalLM:
    paddle.seed(training_args.seed)
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name) if name else small_config(example_args, tokenizer, length)
    found = [kind for kind in getattr(config, "architectures", None) or [] if kind.endswith(OTHER_HEADS)]
    if found:  # PaddleNLP would put a random language model head in the place of what is there
        raise SystemExit(
            f"--model_name_or_path {name} holds a {found[0]}, which has no language model head: expected the "
            "checkpoint of a causal language model"
        )
    # This is how use_flash_attention, which --flash_mask sets, and recompute reach the model.
    LlmMetaConfig.set_llm_config(config, training_args)
    config.use_cache = False
    if not name:
        return LlamaForCausalLM(config)
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)


def main() -> None:
    model_args, data_args, training_args, example_args = parse_arguments()
    if model_args.lora or model_args.lora_path:
        raise SystemExit("--lora true or --lora_path: this example trains all weights; use examples/lora.py")
    folder = run_folder(training_args, example_args.compare)
    if data_args.dataset_name_or_path is None:
        data = folder / "data"
        data_args.dataset_name_or_path = str(data)
        if not (data / "train.json").exists():  # a resumed run takes what is there
            print("Reading the docstrings of Python's standard library", flush=True)
            write_corpus(data, example_args.vocab_size)
    if example_args.compare:
        compare(__file__, sys.argv[1:], folder, data_args.dataset_name_or_path)
        return

    # 1. One call after parsing: routes PaddleNLP's attention, or says what contradicts --flash_mask.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    mask: Literal["flashmask", "dense"] = "flashmask" if flash_mask else "dense"

    # 2. Prompts and answers, packed: many samples a row, none of which sees another. First, so that a mistake in the
    # data shows before a large model is loaded.
    tokenizer = load_tokenizer(model_args, data_args.dataset_name_or_path)
    dataset, eval_dataset, collator = packed_pairs(tokenizer, data_args, example_args, mask)
    check_steps(training_args, dataset)

    # 3. A model as always.
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_length)
    if flash_mask:
        flashmask_nlp.check_model(model)
    flashmask_nlp.check_positions(model, longest_sample(dataset, eval_dataset))

    # 4. PaddleNLP's trainer, untouched. With --flash_mask_verify true the first batch is checked layer by layer.
    watch = Watch(MASKS[mask], data_args.max_length)
    checks = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=[watch, *checks],
    )
    result = {**train(trainer, watch), "mask": mask, "first_row_lengths": dataset[0]["lengths"].tolist()}
    report("SFT", folder, {**result, "fill": dataset.stats().fill})


if __name__ == "__main__":
    main()
