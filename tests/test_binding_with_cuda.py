"""The GPU branch of the Paddle op compiles against the installed Paddle, whether or not that is a GPU build.

Compiled, not run: a build of Paddle without CUDA has the same headers, with the GPU parts behind PADDLE_WITH_CUDA.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_gpu_branch_compiles(monkeypatch, tmp_path):
    import setuptools
    from paddle.utils.cpp_extension import CppExtension

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    script = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = script["find_nvcc"]()
    if nvcc is None:
        pytest.skip("CUDA's headers are found by nvcc, and there is no nvcc here")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    source = ROOT / "custom_ops" / "paddle" / "flashmask_binding.cc"
    includes = [*CppExtension(sources=[str(source)]).include_dirs, *script["cuda_include_dirs"](nvcc)]
    includes.append(str(ROOT / "custom_ops" / "flashmask"))
    compiled = tmp_path / "binding.o"
    command = [compiler, "-c", "-O0", "-w", "-std=c++17", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=1", "-DPADDLE_WITH_CUDA"]
    command += [*(f"-I{folder}" for folder in includes), str(source), "-o", str(compiled)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    symbols = subprocess.run(["nm", "-C", "-u", str(compiled)], capture_output=True, text=True, check=True).stdout
    assert "paddle::Tensor::stream() const" in symbols, "the branch that takes Paddle's stream was not compiled"
