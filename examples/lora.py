"""LoRA fine-tuning with PaddleNLP's LoRAModel and SFTTrainer on packed rows, with FlashMask or with a dense mask.

    python examples/lora.py examples/config/lora-tiny-cpu.json    # a small Llama on a laptop
    python examples/lora.py --model_name_or_path DIR --dataset_name_or_path train.json --flash_mask true \
        --output_dir out

Arguments are PaddleNLP's (ModelConfig with --lora_rank and --lora_path, DataConfig, SFTConfig) and the few below; a
JSON file may hold them, and what follows it on the command line wins. Without a model, examples/sft.py first trains a
small one, all of its weights, on one half of the docstrings of Python's standard library. The adapters then learn your
data or, without any, the other half. Nothing is downloaded. --resume_from_checkpoint out/checkpoint-15 goes on where
that run stopped.
"""

import quiet  # noqa: F401

# isort: split

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from adapters import add_adapters, check_checkpoint, trained_weights
from compare import compare
from corpus import write_corpus
from paddlenlp.trl import DataConfig, ModelConfig, SFTConfig, SFTTrainer
from reports import MASKS, report
from rows import longest_sample, packed_pairs, training_file
from runs import Watch, check_steps, parse, run_folder, train
from sft import PairArguments, load_model, load_tokenizer

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class LoraArguments(PairArguments):
    base_steps: int = field(default=30, metadata={"help": "Steps that train the base, without a model."})
    base_learning_rate: float = field(default=1e-3, metadata={"help": "Of those steps."})


def parse_arguments() -> tuple[ModelConfig, DataConfig, SFTConfig, LoraArguments]:
    return parse(ModelConfig, DataConfig, SFTConfig, LoraArguments)


def prepare(
    folder: Path,
    model_args: ModelConfig,
    data_args: DataConfig,
    training_args: SFTConfig,
    example_args: LoraArguments,
) -> None:
    """Without a model: train a base on one half of the docstrings. Without data: write the other half."""
    base = folder / "base"
    trains_base = model_args.model_name_or_path is None and not base.exists()
    own_data = data_args.dataset_name_or_path
    data = folder / "data"
    writes_data = not own_data and not (data / "train.json").exists()  # a resumed run takes what is there
    if own_data and trains_base:
        # A wrong name or format shows before the base is trained.
        next(flashmask_nlp.read_pairs(training_file(own_data)), None)
    if writes_data or trains_base:
        print("Reading the docstrings of Python's standard library", flush=True)
        file, tokenizer = write_corpus(folder / "base-data", example_args.vocab_size)
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[::2]), encoding="utf-8")
        if writes_data:
            data.mkdir(exist_ok=True)
            (data / "train.json").write_text("".join(lines[1::2]), encoding="utf-8")
            (data / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if not own_data:
        data_args.dataset_name_or_path = str(data)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(base)
        if trains_base:
            print(f"Training a base model of its own for {example_args.base_steps} steps", flush=True)
            sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
            settings = {name: getattr(example_args, name) for name in sizes} | {
                "dataset_name_or_path": folder / "base-data",
                "output_dir": base,
                "max_length": data_args.max_length,
                "max_steps": example_args.base_steps,
                "learning_rate": example_args.base_learning_rate,
                "device": training_args.device,
                "eval_every": 0,
            }
            if model_args.tokenizer_name_or_path:  # what encodes the adapters' data
                settings["tokenizer_name_or_path"] = model_args.tokenizer_name_or_path
            arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
            fixed = "--flash_mask true --greedy_zero_padding true --per_device_train_batch_size 1 --warmup_steps 5"
            fixed += " --logging_steps 1 --save_steps 1000000 --disable_tqdm true --report_to none"
            subprocess.run([sys.executable, Path(__file__).with_name("sft.py"), *arguments, *fixed.split()], check=True)


def main() -> None:
    model_args, data_args, training_args, example_args = parse_arguments()
    check_checkpoint(model_args, training_args.resume_from_checkpoint)
    folder = run_folder(training_args, example_args.compare)
    prepare(folder, model_args, data_args, training_args, example_args)
    if example_args.compare:
        base = ["--model_name_or_path", model_args.model_name_or_path]
        compare(__file__, [*sys.argv[1:], *base], folder, data_args.dataset_name_or_path)
        return

    # 1. The flag.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    mask: Literal["flashmask", "dense"] = "flashmask" if flash_mask else "dense"

    # 2. Prompts and answers, packed: before the model, so that a mistake in the data shows early.
    tokenizer = load_tokenizer(model_args, data_args.dataset_name_or_path)
    dataset, eval_dataset, collator = packed_pairs(tokenizer, data_args, example_args, mask)
    check_steps(training_args, dataset)

    # 3. A model with adapters: only they are trained.
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_length)
    model = add_adapters(model, model_args)
    if flash_mask:
        flashmask_nlp.check_model(model)
    flashmask_nlp.check_positions(model, longest_sample(dataset, eval_dataset))

    # 4. PaddleNLP's trainer, untouched. It saves the adapters: give the folder to --lora_path, or LoRAModel.merge().
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
    report("LoRA", folder, {**result, "fill": dataset.stats().fill, "trained_weights": trained_weights(model)})


if __name__ == "__main__":
    main()
