"""LoRA fine-tuning with PaddleNLP's LoRAModel and SFTTrainer on packed rows, with FlashMask or with a dense mask.

    python examples/lora.py examples/config/lora-tiny-cpu.json    # a small Llama on a laptop
    python examples/lora.py --model_name_or_path DIR --dataset_name_or_path train.json --flash_mask true

Arguments are PaddleNLP's (ModelConfig with --lora_rank and --lora_path, DataConfig, SFTConfig) and the few below; a
JSON file may hold them, and what follows it on the command line wins. Without a model, examples/sft.py first trains a
small one, all of its weights, on one half of the docstrings of Python's standard library; the adapters then learn the
other half. Nothing is downloaded. --resume_from_checkpoint out/checkpoint-15 goes on where that run stopped.
"""

import quiet  # noqa: F401

# isort: split

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from compare import compare
from corpus import write_corpus
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.trainer import PdArgumentParser
from paddlenlp.trl import DataConfig, ModelConfig, SFTConfig, SFTTrainer
from paddlenlp.trl.llm_utils import get_lora_target_modules
from rich.console import Console
from rich.table import Table
from runs import Watch, new_folder
from sft import ExampleArguments, load_model, load_tokenizer

import paddle_flashmask.paddlenlp as flashmask_nlp


@dataclass
class LoraArguments(ExampleArguments):
    base_steps: int = field(default=30, metadata={"help": "Steps that train the base, without a model."})
    base_learning_rate: float = field(default=1e-3, metadata={"help": "Of those steps."})
    eval_every: int = field(default=20, metadata={"help": "Every so many-th sample is kept for evaluation."})


def parse_arguments() -> tuple[ModelConfig, DataConfig, SFTConfig, LoraArguments]:
    parser = PdArgumentParser((ModelConfig, DataConfig, SFTConfig, LoraArguments))
    if len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file_and_cmd_lines()
    return parser.parse_args_into_dataclasses()


def prepare(
    folder: Path,
    model_args: ModelConfig,
    data_args: DataConfig,
    training_args: SFTConfig,
    example_args: LoraArguments,
) -> None:
    """Without data or a model: write the docstrings' two halves, and train a base on the first."""
    if data_args.dataset_name_or_path is None:
        data_args.dataset_name_or_path = str(folder / "data")
        print("Reading the docstrings of Python's standard library", flush=True)
        file, tokenizer = write_corpus(folder / "data", example_args.vocab_size)
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        base = folder / "base-data"
        base.mkdir(exist_ok=True)
        (base / "train.json").write_text("".join(lines[::2]), encoding="utf-8")
        (base / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        file.write_text("".join(lines[1::2]), encoding="utf-8")
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(folder / "base")
        if not (folder / "base").exists():
            print(f"Training a base model of its own for {example_args.base_steps} steps", flush=True)
            sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
            settings = {name: getattr(example_args, name) for name in sizes} | {
                "dataset_name_or_path": folder / "base-data",
                "output_dir": folder / "base",
                "max_length": data_args.max_length,
                "max_steps": example_args.base_steps,
                "learning_rate": example_args.base_learning_rate,
                "device": training_args.device,
            }
            arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
            fixed = "--flash_mask true --greedy_zero_padding true --per_device_train_batch_size 1 --warmup_steps 5"
            fixed += " --logging_steps 1 --save_steps 1000000 --disable_tqdm true --report_to none"
            subprocess.run([sys.executable, Path(__file__).with_name("sft.py"), *arguments, *fixed.split()], check=True)


def main() -> None:
    model_args, data_args, training_args, example_args = parse_arguments()
    folder = Path(training_args.output_dir)
    if training_args.resume_from_checkpoint is None:
        folder = new_folder(folder)
        training_args.output_dir = str(folder)
    prepare(folder, model_args, data_args, training_args, example_args)
    if example_args.compare:
        base = ["--model_name_or_path", model_args.model_name_or_path]
        compare(__file__, [*sys.argv[1:], *base], folder, data_args.dataset_name_or_path)
        return

    # 1. The flag, and a model with adapters: only they are trained.
    flash_mask = flashmask_nlp.enable_from_args(model_args, training_args)
    data = Path(data_args.dataset_name_or_path)
    tokenizer = load_tokenizer(model_args, data / "tokenizer.json")
    model = load_model(model_args, training_args, example_args, tokenizer, data_args.max_length)
    if model_args.lora_path:
        model = LoRAModel.from_pretrained(model, model_args.lora_path)
    else:
        targets, rank = get_lora_target_modules(model), model_args.lora_rank
        scale = {"rslora": model_args.rslora, "lora_plus_scale": model_args.lora_plus_scale}
        model = LoRAModel(
            model, LoRAConfig(target_modules=targets, r=rank, lora_alpha=2 * rank, dtype=model.config.dtype, **scale)
        )
    model.mark_only_lora_as_trainable()
    if flash_mask:
        flashmask_nlp.check_model(model)
    sizes = [(parameter.size, not parameter.stop_gradient) for parameter in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    print(f"{trained:,} of {sum(size for size, _ in sizes):,} weights are trained (rank {model_args.lora_rank})")

    # 2. Prompts and answers, packed; some are kept for evaluation.
    pairs = list(flashmask_nlp.read_pairs(data / "train.json" if data.is_dir() else data))
    pairs = pairs[: example_args.max_samples or None]
    samples = [flashmask_nlp.encode_pair(tokenizer, *pair) for pair in pairs]
    packing = {"strategy": "greedy" if data_args.greedy_zero_padding else "in_order", "too_long": "skip"}
    kept = set(range(0, len(samples), example_args.eval_every)) if example_args.eval_every else set()
    dataset = flashmask_nlp.PackedDataset(
        [sample for index, sample in enumerate(samples) if index not in kept], data_args.max_length, **packing
    )
    held_out = [samples[index] for index in sorted(kept)]
    eval_dataset = flashmask_nlp.PackedDataset(held_out, data_args.max_length, **packing) if held_out else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = flashmask_nlp.PackingCollator(data_args.max_length, pad, mask="flashmask" if flash_mask else "dense")
    stats = dataset.stats()
    print(
        f"{stats.samples} samples in {stats.rows} rows of {data_args.max_length} tokens, {stats.fill:.1%} filled; "
        f"the mask leaves {stats.attended:.1%} of the scores; {len(held_out)} samples are kept for evaluation",
        flush=True,
    )

    # 3. PaddleNLP's trainer, untouched.
    watch = Watch("FlashMask" if flash_mask else "dense mask", data_args.max_length)
    callbacks = [watch, flashmask_nlp.VerifyCallback()] if flash_mask and example_args.flash_mask_verify else [watch]
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        tokenizer=tokenizer,
        callbacks=callbacks,
    )
    before = trainer.evaluate()["eval_loss"] if eval_dataset else None
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"] if eval_dataset else None
    if training_args.save_strategy.value != "no":
        trainer.save_model()  # the adapters: give the folder to --lora_path, or merge them with LoRAModel.merge()
    report(
        folder, {**watch.result(), "eval_loss_before": before, "eval_loss": after, "trained_weights": trained}, dataset
    )


def report(folder: Path, result: dict, dataset: flashmask_nlp.PackedDataset) -> None:
    """Write result.json and print what matters of it."""
    result = {**result, "first_row_lengths": dataset[0]["lengths"].tolist(), "fill": dataset.stats().fill}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    table = Table(title=f"LoRA, {result['steps']} steps", title_justify="left", show_header=False)
    table.add_row("training loss, first and last step", f"{result['losses'][0]:.4f}  {result['losses'][-1]:.4f}")
    if result["eval_loss"] is not None:
        table.add_row(
            "evaluation loss, before and after", f"{result['eval_loss_before']:.4f}  {result['eval_loss']:.4f}"
        )
    table.add_row("tokens/s", f"{result['tokens_per_s']:,.0f}")
    table.add_row("peak memory, MiB", f"{result['peak_mib']:,.0f}")
    Console().print(table)
    Console().print(f"In {folder}: result.json, and the adapters if they were saved", highlight=False)


if __name__ == "__main__":
    main()
