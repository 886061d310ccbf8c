"""One sequence on two GPUs: paddle_flashmask.distributed by NCCL, a process for each GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import carrier
import paddle
import pytest
from worker_processes import run_workers

carrier.require_device()

WORKERS, SECONDS = 2, 100
BACKEND = "nccl" if carrier.ON_GPU else "gloo"
WORKER = Path(__file__).with_name("distributed_gpu_worker.py")
# Rounding of what one GPU rounds once: a gradient of keys is a sum of two rounded shares.
LARGEST = {"out": 0.0, "lse": 0.0, "dq": 0.0, "dk": 0.005, "dv": 0.005}


@pytest.mark.skipif(carrier.ON_GPU and paddle.device.cuda.device_count() < WORKERS, reason="needs two GPUs")
def test_one_sequence_on_two_gpus(record_property, tmp_path):
    """Rows have the bits that one GPU computes, sums over keys are the same but for rounding; every time."""
    found = [tmp_path / f"worker-{rank}.json" for rank in range(WORKERS)]
    commands = [["-X", "faulthandler", WORKER, file] for file in found]
    environment = {"PADDLE_DISTRI_BACKEND": BACKEND, "PYTHONPATH": os.pathsep.join(sys.path)}
    run_workers(commands, tmp_path, environment, SECONDS)
    for number, record in enumerate(json.loads(file.read_text()) for file in found):
        assert (record["backend"], record["workers"]) == (BACKEND, WORKERS)
        record_property(f"worker {number}", record)
        for dtype, masks in record["differences"].items():
            for mask, errors in masks.items():
                for name, error in errors.items():
                    assert error <= LARGEST[name], (number, dtype, mask, name, error)
