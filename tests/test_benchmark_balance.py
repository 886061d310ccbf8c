"""benchmarks/balance.py counts tiles of the shapes that the Hopper kernels have."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = """
#include <cstdio>

#include "cuda/head_groups.h"
#include "sm90/backward_config.cuh"
#include "sm90/forward_config.h"

using namespace flashmask;
using namespace flashmask::sm90;

template <typename Shape>
void print(const char* kernel, int head_dim) {
  std::printf("[\\"%s\\", %d, [%d, %d]],", kernel, head_dim, Shape::kRows, Shape::kColumns);
}

template <int kHeadDim>
void print_all() {
  using Forward = ForwardConfig<kHeadDim>;
  print<Forward>("forward", kHeadDim);
  print<std::conditional_t<kHasUnmasked<kHeadDim>, UnmaskedConfig<kHeadDim>, Forward>>("unmasked", kHeadDim);
  print<BackwardConfig<kHeadDim>>("backward", kHeadDim);
}

int main() {
  std::printf("{\\"tiles\\": [");
  print_all<64>();
  print_all<128>();
  std::printf("null], \\"groups\\": [%lld, %lld, %d]}", static_cast<long long>(kRowsOfLastGroup),
              static_cast<long long>(kKeysOfLastGroup), kColumnTilesOfGroup);
}
"""


@pytest.fixture(scope="module")
def balance(load):
    return load("benchmarks.balance")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """What the kernels' headers say, compiled without CUDA: headers that hold PTX are replaced by the emulator's."""
    folder = tmp_path_factory.mktemp("balance")
    shutil.copytree(ROOT / "custom_ops" / "flashmask", folder / "flashmask")
    shutil.copytree(EMULATOR / "overlay", folder / "flashmask", dirs_exist_ok=True)
    source, program = folder / "shapes.cpp", folder / "shapes"
    source.write_text(PROGRAM)
    includes = [f"-I{path}" for path in (EMULATOR, EMULATOR / "toolkit", folder / "flashmask")]
    options = ["-std=c++17", "-Wno-unknown-pragmas", "-fno-extern-tls-init", "-include", "cuda_runtime.h"]
    built = subprocess.run(["g++", *options, *includes, source, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


@needs_compiler
def test_tiles_are_the_kernels(balance, kernels):
    mine = {
        "forward": balance.FORWARD.tiles,
        "unmasked": balance.FORWARD.unmasked_tiles,
        "backward": balance.BACKWARD.tiles,
    }
    theirs = {(kernel, head_dim): tuple(tile) for kernel, head_dim, tile in kernels["tiles"][:-1]}
    assert {(kernel, head_dim): tile for kernel in mine for head_dim, tile in mine[kernel].items()} == theirs
    assert balance.BACKWARD.unmasked_tiles == balance.BACKWARD.tiles


@needs_compiler
def test_groups_are_the_kernels(balance, kernels):
    mine = (balance.FORWARD.rows_of_last_group, balance.BACKWARD.rows_of_last_group, balance.BACKWARD.group_tiles)
    assert list(mine) == kernels["groups"]


def test_costs_by_hand(balance):
    """Of 8,192 rows, the last row tile of 192 comes first and the first one next; of full they are all alike."""
    case = balance.Case("causal", 8192, 128, 32, 1, "bfloat16")
    forward = balance.FORWARD.costs(case)
    assert forward.shape == (1, 43)
    np.testing.assert_allclose(forward[0, :3] - balance.FORWARD.fixed_cost, [128, 3, 126])
    backward = balance.BACKWARD.costs(case)
    assert backward.shape == (1, 64)
    np.testing.assert_allclose(backward[0, [0, 1, 63]] - balance.BACKWARD.fixed_cost, [128, 126, 2])
    full = balance.FORWARD.costs(balance.Case("full", 8192, 64, 64, 1, "bfloat16"))
    np.testing.assert_allclose(full, np.full((1, 43), 64 + balance.FORWARD.fixed_cost))
