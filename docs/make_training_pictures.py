"""Draw the masks of docs/training.md, from rows that the library packs.

python docs/make_training_pictures.py --overwrite
"""

from __future__ import annotations

import argparse
from pathlib import Path

from paddle_flashmask.paddlenlp import PackedDataset, PackingCollator, PreferenceCollator, PreferenceDataset
from paddle_flashmask.plotting import plot_mask_and_blocks

SEQLEN, TILE = 1024, (64, 64)


def preference(prompt: int, *answers: int) -> dict:
    """A prompt and its answers, of the given lengths; the tokens do not matter here."""
    ranks = list(range(len(answers), 0, -1))
    return {"prompt": [1] * prompt, "responses": [[1] * answer for answer in answers], "sort": ranks}


def rows(task: str) -> tuple[str, dict]:
    """Title and batch of one packed row."""
    if task == "sft":
        samples = [{"input_ids": [1] * length, "labels": [1] * length} for length in (300, 180, 410)]
        return "SFT: three samples", PackingCollator(SEQLEN)([PackedDataset(samples, SEQLEN, "in_order")[0]])
    groups = {
        "dpo": [preference(200, 150, 110), preference(240, 90, 140)],
        "reward": [preference(220, 130, 90, 160, 110), preference(120, 70, 60)],
    }
    title = {"dpo": "DPO: two prompts, two answers each", "reward": "Reward model: four answers, and two"}[task]
    dataset = PreferenceDataset(groups[task], SEQLEN, task, strategy="in_order")  # type: ignore[arg-type]
    return title, PreferenceCollator(SEQLEN, task)([dataset[0]])  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="folder for the PNG files")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in ("sft", "dpo", "reward"):
        title, batch = rows(task)
        indices = batch["attn_mask_startend_row_indices"][..., None]
        path = arguments.out / f"training_{task}.png"
        plot_mask_and_blocks(
            indices, True, SEQLEN, tile=TILE, title=title, path=path, overwrite=arguments.overwrite, dpi=70
        )
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
