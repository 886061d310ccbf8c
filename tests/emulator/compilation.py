"""Builds kernels for the emulated machine: one shared library for an architecture, direction and head dim."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
FLASHMASK = HERE.parents[1] / "custom_ops" / "flashmask"
TYPES = {"bf16": ("__nv_bfloat16", "FLASHMASK_BFLOAT16"), "fp16": ("__half", "FLASHMASK_FLOAT16")}
# So small that heads of the tests' lengths are scheduled in several groups (the cache, and the last group), that they
# have several row items, and that dQ of some rows is added to zeros. And so many tiles are still few that random masks
# have few.
SMALLER = (
    ("cuda/cuda_backend.cu", "kCacheBudget = 20 << 20;", "kCacheBudget = 64 << 10;"),
    ("cuda/cuda_backend.cu", "kFewTiles = 0.3;", "kFewTiles = 0.7;"),
    ("sm90/backward_config.cuh", "kRowTilesPerItem = 16;", "kRowTilesPerItem = 4;"),
    ("sm90/backward_config.cuh", "kFewMoreColumnTiles = 4,", "kFewMoreColumnTiles = 0,"),
    (
        "cuda/head_groups.h",
        "kRowsOfLastGroup = 128 << 10, kKeysOfLastGroup = 64 << 10;",
        "kRowsOfLastGroup = 512, kKeysOfLastGroup = 512;",
    ),
)
FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-Wno-unknown-pragmas", "-ffp-contract=off"),
    "-DFLASHMASK_WITH_SM90",
    "-fno-extern-tls-init",  # dynamic shared memory is declared like thread-local data
)


class Builder:
    """A copy of the kernels under `folder`, with the machine's headers over those that hold PTX."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "flashmask"
        shutil.copytree(FLASHMASK, self.source)
        shutil.copytree(HERE / "overlay", self.source, dirs_exist_ok=True)
        for name, number, smaller in SMALLER:
            file = self.source / name
            text = file.read_text()
            assert number in text
            file.write_text(text.replace(number, smaller))
        machine = [(HERE / f"{name}.cpp", "-O3") for name in ("scheduler", "synchronisation", "copy_engine", "races")]
        machine += [(HERE / "warp_matrices.cpp", "-O3")]
        machine += [(HERE / "tensor_cores.cpp", "-O3"), (HERE / "entry.cpp", "-O2")]
        host = [(self.source / "cuda" / name, "-O2") for name in ("cuda_backend.cu", "tile_lists.cu")]
        self.common = [self._compile(source, level) for source, level in machine + host]

    def library(
        self,
        direction: str,
        head_dim: int,
        dtypes: tuple[str, ...] = ("bf16", "fp16"),
        arch: str = "sm90",
        variant: str = "",
    ) -> Path:
        """Compiles the kernels of "forward" or "backward" for one head dim; returns the library's path.

        `variant` tells libraries of changed sources from each other.
        """
        name = f"{direction}_{head_dim}" + ("" if arch == "sm90" else f"_{arch}") + variant
        generated = self.folder / name
        generated.mkdir()
        table, objects = "", []
        for dtype in dtypes:
            type_, enumerator = TYPES[dtype]
            capabilities = "90, 90" if arch == "sm90" else "80, 90"
            table += f"FLASHMASK_{direction.upper()}({arch}, {capabilities}, {enumerator}, {type_}, {head_dim})\n"
            text = (self.source / "cuda" / "instance.cu.in").read_text()
            values = {"ARCH": arch, "DIRECTION": direction, "TYPE": type_, "HEAD_DIM": str(head_dim)}
            for key, value in values.items():
                text = text.replace(f"@{key}@", value)
            instance = generated / f"instance_{dtype}.cu"
            instance.write_text(text)
            objects.append(self._compile(instance, "-O2"))
        (generated / "built_kernels.inc").write_text(table)
        objects.append(self._compile(self.source / "cuda" / "kernel_table.cu", "-O2", generated))
        library = self.folder / f"lib{name}.so"
        _run("g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-o", library, *self.common, *objects)
        return library

    def _compile(self, source: Path, level: str, *include: Path) -> Path:
        output = self.folder / f"{source.parent.name}_{source.stem}{'_' + include[0].name if include else ''}.o"
        folders = [f"-I{folder}" for folder in (HERE, HERE / "toolkit", self.source, *include)]
        _run("g++", *FLAGS, level, *folders, "-include", "cuda_runtime.h", "-x", "c++", "-c", source, "-o", output)
        return output


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
