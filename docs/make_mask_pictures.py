"""Draws the pictures of docs/masks.md: each builder's mask and its block classes.

python docs/make_mask_pictures.py [--out docs/images] [--overwrite]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from paddle_flashmask import masks
from paddle_flashmask.plotting import plot_mask_and_blocks

SEQLEN = 1024
TILE = (64, 64)
DOCUMENTS = [[256, 416, 352]]

MASKS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "sliding_window": masks.sliding_window(SEQLEN, 200),
    "causal_document": masks.causal_document(DOCUMENTS),
    "document": masks.document(DOCUMENTS),
    "share_question": masks.share_question([[[192, 160, 128, 96], [160, 160, 128]]]),
    "global_sliding_window": masks.global_sliding_window(SEQLEN, 64, 128, 128),
    "causal_blockwise": masks.causal_blockwise([[256, 224, 288, 256]]),
    "prefix_lm_causal": masks.prefix_lm_causal(SEQLEN, 384),
    "prefix_lm_document": masks.prefix_lm_document(DOCUMENTS, [[96, 224, 128]]),
    "qk_sparse": masks.qk_sparse([[320, 192, 160, 224, 128]], [[0, 1, 0, 1, 0]]),
    "hash_sparse": masks.hash_sparse([[224, 96, 320, 64, 320]]),
    "random_eviction": masks.random_eviction(SEQLEN, seed=0, start_row=SEQLEN // 2),
    "padding": masks.causal_document([[256, 352]], seqlen=SEQLEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="folder for the PNG files")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, mask in MASKS.items():
        path = arguments.out / f"mask_{name}.png"
        plot_mask_and_blocks(*mask, SEQLEN, tile=TILE, title=name, path=path, overwrite=arguments.overwrite, dpi=70)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
