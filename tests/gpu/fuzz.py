"""Random problems for as long as one likes, each against dense float64 attention: shapes, dtypes, dropout, masks.

    python tests/gpu/fuzz.py --seconds 300 --first-seed 0       # needs `make cuda-lib`, PyTorch and a GPU
    python tests/gpu/fuzz.py --seed 1234                        # one of them again

Of the masks half are those of training (`paddle_flashmask.masks`), half random intervals. Short sequences come in
large batches, so that there are errors enough to compare. Three times the errors of plain low precision are allowed
instead of two: of ten thousand problems one reaches 2.3. Prints the seeds of problems that went wrong; the exit status
is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from device_tensors import why_not  # noqa: E402
from reference import FORMS  # noqa: E402

from paddle_flashmask import masks  # noqa: E402

LONGEST = 6000
KERNEL_DIMS = (64, 96, 128, 192, 256)


def lengths(rng: np.random.Generator, total: int) -> list[int]:
    """Of some documents that fill `total`; few long ones or many short ones."""
    count = int(min(total, np.exp(rng.uniform(0, np.log(min(total, 200) + 1)))))
    ends = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False)) if count > 1 else np.array([], int)
    return np.diff(ends, prepend=0, append=total).tolist()


def mask_of_training(rng: np.random.Generator, b: int, s: int) -> tuple[Any, bool]:
    """One of the families, with other lengths in each row of the batch."""
    rows = [lengths(rng, s) for _ in range(b)]
    prefixes = [[int(rng.integers(0, length + 1)) for length in row] for row in rows]
    flags = [[int(rng.integers(2)) for _ in row] for row in rows]
    whole, part = [s] * b, int(rng.integers(1, s + 1))
    families: list[Callable[[], tuple[Any, bool]]] = [
        lambda: masks.causal_document(rows),
        lambda: masks.document(rows),
        lambda: masks.prefix_lm_document(rows, prefixes),
        lambda: masks.causal_blockwise(rows),
        lambda: masks.sliding_window(whole, part),
        lambda: masks.global_sliding_window(
            whole, int(rng.integers(0, min(s, 64) + 1)), part, int(rng.integers(1, s + 1))
        ),
        lambda: masks.prefix_lm_causal(whole, part),
        lambda: masks.qk_sparse(rows, flags),
        lambda: masks.random_eviction(whole, seed=int(rng.integers(1000))),
    ]
    if all(len(row) > 1 for row in rows):
        families.append(lambda: masks.share_question([[row] for row in rows]))
    return families[rng.integers(len(families))]()


def problem(seed: int) -> Any:
    """What the seed stands for."""
    from problem import Problem

    rng = np.random.default_rng([2024, seed])
    s_q, s_k = (int(np.exp(rng.uniform(0, np.log(LONGEST)))) for _ in range(2))
    of_training, square = (bool(draw) for draw in rng.integers(2, size=2))
    if of_training or square:
        s_q = s_k
    h_k = int(rng.choice([1, 2, 3]))
    h_q = h_k * int(rng.choice([1, 2, 4]))
    b = int(rng.integers(1, 4)) if max(s_q, s_k) < 2048 else 1
    # Rows or keys enough, and at most so many scores of a head and numbers of a tensor.
    b = max(b, min(500 // min(s_q, s_k), 10**6 // (s_q * s_k), 10**8 // (max(s_q, s_k) * h_q * KERNEL_DIMS[-1])))
    d = int(rng.choice(KERNEL_DIMS)) if rng.random() < 0.7 else int(rng.integers(1, 33)) * 8
    options: dict[str, Any] = {"deterministic": bool(rng.integers(2)), "no_skip": bool(rng.random() < 0.1)}
    if rng.random() < 0.1:
        options.update(dropout=float(rng.choice([0.1, 0.7])), seed=int(rng.integers(2**62)), offset=3)
    made: dict[str, Any] = {}
    if of_training:
        bounds, causal = mask_of_training(rng, b, s_k)
        if bounds is None:
            made = {"causal": causal}
        else:
            bounds = bounds.repeat(b // bounds.shape[0], axis=0)
            made = {"bounds": bounds, "n": bounds.shape[3], "causal": causal, "h_m": bounds.shape[1]}
    else:
        n, causal = ((0, False), (0, True), *FORMS)[rng.integers(6)]
        made = {"n": n, "causal": causal, "h_m": int(rng.choice([1, h_k, h_q])) if n else 1}
    return Problem(
        b=b,
        s_q=s_q,
        s_k=s_k,
        h_q=h_q,
        h_k=h_k,
        d=d,
        d_v=d if rng.random() < 0.8 else int(rng.integers(1, 33)) * 8,
        dtype=str(rng.choice(["bf16", "fp16"])),
        seed=seed,
        block_mask=bool(rng.random() < 0.1),
        options=options,
        **made,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default: 60)")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here")
    parser.add_argument("--seed", type=int, help="only this one")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"fuzz.py: {reason}")
    first = arguments.first_seed if arguments.seed is None else arguments.seed
    end, seed, failed = time.monotonic() + arguments.seconds, first, []
    while seed == first or (arguments.seed is None and time.monotonic() < end):
        case = problem(seed)
        try:
            case.run(times=3.0)
        except Exception as error:
            failed.append(seed)
            case.bounds = None if case.bounds is None else f"{case.bounds.shape} of a mask of training"
            print(f"seed {seed}: {case}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, (AssertionError, ValueError)):
                raise  # of the device, for instance, which may be of no use any more
        seed += 1
    print(f"{seed - first - len(failed)} passed, {len(failed)} failed (seeds {first} to {seed - 1}): {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
