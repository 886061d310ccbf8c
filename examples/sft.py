"""Supervised fine-tuning (SFT) with PaddleNLP's own SFTTrainer on packed rows, with FlashMask or with a dense mask.

    python examples/sft.py examples/config/sft-tiny-cpu.json         # a small Llama on a laptop, both masks compared
    python examples/sft.py --model_name_or_path DIR --dataset_name_or_path train.json --flash_mask true --output_dir out

Arguments are PaddleNLP's (ModelConfig, DataConfig, SFTConfig) and the few below; a JSON file may hold them, and what
follows it on the command line wins. Without a model a small Llama starts from random weights. Without data the model
learns what the functions of Python's standard library do, from their docstrings: nothing is downloaded.
"""

import quiet  # noqa: F401

# isort: split

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import paddle
from compare import compare
from corpus import write_corpus
from paddlenlp.trainer import PdArgumentParser
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
from runs import Watch, new_folder

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class ExampleArguments(flashmask_nlp.VerifyArguments):
    compare: bool = field(default=False, metadata={"help": "Train with FlashMask and with a dense mask, and compare."})
    max_samples: int = field(default=0, metadata={"help": "Use the first so many samples; 0 is all."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer that is trained, without a model."})
    hidden_size: int = field(default=256, metadata={"help": "Of the random Llama, without a model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Of the random Llama, without a model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Of the random Llama, without a model."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Of the random Llama, without a model."})


def parse_arguments() -> tuple[ModelConfig, DataConfig, SFTConfig, ExampleArguments]:
    parser = PdArgumentParser((ModelConfig, DataConfig, SFTConfig, ExampleArguments))
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file_and_cmd_lines()
    return parser.parse_args_into_dataclasses()


def load_tokenizer(model_args: ModelConfig, file: Path) -> PretrainedTokenizerFast:
    if model_args.model_name_or_path:
        return AutoTokenizer.from_pretrained(model_args.tokenizer_name_or_path or model_args.model_name_or_path)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PretrainedTokenizerFast(tokenizer_file=str(file), **special)


def load_model(
    model_args: ModelConfig,
    training_args: SFTConfig,
    example_args: ExampleArguments,
    tokenizer: PretrainedTokenizerFast,
    length: int,
) -> LlamaForCausalLM:
    paddle.seed(training_args.seed)
    if model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=example_args.hidden_size,
            intermediate_size=example_args.hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=example_args.num_hidden_layers,
            num_attention_heads=example_args.num_attention_heads,
            num_key_value_heads=example_args.num_key_value_heads,
            max_position_embeddings=length,
        )
    # This is how use_flash_attention, which --flash_mask sets, and recompute reach the model.
    LlmMetaConfig.set_llm_config(config, training_args)
    config.use_cache = False
    if not model_args.model_name_or_path:
        return LlamaForCausalLM(config)
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config, dtype=dtype)


def main() -> None:
    model_args, data_args, training_args, example_args = parse_arguments()
    folder = Path(training_args.output_dir)
    if training_args.resume_from_checkpoint is None:
        folder = new_folder(folder)
        training_args.output_dir = str(folder)
    if data_args.dataset_name_or_path is None:
        data_args.dataset_name_or_path = str(folder / "data")
        print("Reading the docstrings of Python's standard library", flush=True)
        write_corpus(folder / "data", example_args.vocab_size)
    if example_args.compare:
        compare(__file__, sys.argv[1:], folder, data_args.dataset_name_or_path)
        return

    # 1. One call after parsing: routes PaddleNLP's attention, or says what contradicts --flash_mask.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)

    # 2. A model as always.
    data = Path(data_args.dataset_name_or_path)
    tokenizer = load_tokenizer(model_args, data / "tokenizer.json")
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_length)
    if flash_mask:
        flashmask_nlp.check_model(model)

    # 3. Prompts and answers, packed: many samples a row, none of which sees another.
    file = data / "train.json" if data.is_dir() else data
    pairs = itertools.islice(flashmask_nlp.read_pairs(file), example_args.max_samples or None)
    dataset = flashmask_nlp.PackedDataset(
        (flashmask_nlp.encode_pair(tokenizer, *pair) for pair in pairs),
        data_args.max_length,
        strategy="greedy" if data_args.greedy_zero_padding else "in_order",
        too_long="skip",
    )
    collator = flashmask_nlp.PackingCollator(
        data_args.max_length,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        mask="flashmask" if flash_mask else "dense",
    )
    stats = dataset.stats()
    print(
        f"{stats.samples} samples in {stats.rows} rows of {data_args.max_length} tokens, {stats.fill:.1%} filled; "
        f"the mask leaves {stats.attended:.1%} of the scores",
        flush=True,
    )

    # 4. PaddleNLP's trainer, untouched. With --flash_mask_verify true the first batch is checked layer by layer.
    checks = [flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else []
    watch = Watch("FlashMask" if flash_mask else "dense mask", data_args.max_length)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=[watch, *checks],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.save_strategy.value != "no":
        trainer.save_model()
    result = {**watch.result(), "first_row_lengths": dataset[0]["lengths"].tolist(), "fill": stats.fill}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
