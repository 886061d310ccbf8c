"""The op's threads are Paddle's: one OpenMP runtime in the process, and Paddle's number of threads."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

import paddle_flashmask

PACKAGE = Path(paddle_flashmask.__file__).parent
RUNTIME = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
pytestmark = pytest.mark.skipif(not RUNTIME.exists(), reason="this Paddle brings no OpenMP runtime of its own")


def test_paddles_runtime_has_every_call_that_the_core_makes():
    """One that it lacked would go to libgomp and leave a parallel region split over two runtimes."""
    library = PACKAGE / "lib" / "libflashmask.so"
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    calls = re.findall(r"\bU ((?:GOMP|omp)_\w+)", listing.stdout)
    assert "GOMP_parallel" in calls
    runtime = ctypes.CDLL(str(RUNTIME))
    assert not [name for name in calls if not hasattr(runtime, name)]


def test_thread_count_is_paddles():
    code = """
import os, paddle
from paddle_flashmask import flashmask_attention
q = paddle.ones([1, 512, 4, 8])
counts = []
for threads in (None, 3, 5):
    if threads:
        paddle.base.core.set_num_threads(threads)
    flashmask_attention(q, q, q)
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[0])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "4"]
