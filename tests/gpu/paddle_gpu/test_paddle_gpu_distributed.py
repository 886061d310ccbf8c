"""One sequence on two GPUs: paddle_flashmask.distributed by NCCL, a process for each GPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import carrier
import paddle
import pytest

carrier.require_device()

WORKERS, SECONDS = 2, 100
BACKEND = "nccl" if carrier.ON_GPU else "gloo"
WORKER = Path(__file__).with_name("distributed_gpu_worker.py")
# Rounding of what one GPU rounds once: a gradient of keys is a sum of two rounded shares.
LARGEST = {"out": 0.0, "lse": 0.0, "dq": 0.0, "dk": 0.005, "dv": 0.005}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(folder: Path) -> list[dict[str, Any]]:
    """What each worker found; fails where one fails, with what that one wrote last."""
    master, *ports = free_ports(WORKERS + 1)
    ends = [f"127.0.0.1:{port}" for port in ports]
    logs, found, processes = [], [], []
    for rank in range(WORKERS):
        logs.append(folder / f"worker-{rank}.txt")
        found.append(folder / f"worker-{rank}.json")
        environment = {
            **os.environ,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(WORKERS),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
            "PADDLE_CURRENT_ENDPOINT": ends[rank],
            "PADDLE_MASTER": f"127.0.0.1:{master}",
            "PADDLE_DISTRI_BACKEND": BACKEND,
            "FLAGS_selected_gpus": str(rank),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with logs[-1].open("w") as output:
            command = [sys.executable, "-X", "faulthandler", WORKER, found[-1]]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    end = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):  # the others may wait for it for ever
            end = min(end, time.monotonic() + 5)
        time.sleep(0.1)
    statuses = [process.poll() for process in processes]  # None: it was still at work
    for process in processes:
        process.kill()
        process.wait()
    failed = [f"worker {r}, status {s}:\n{logs[r].read_text()[-3000:]}" for r, s in enumerate(statuses) if s != 0]
    assert not failed, "\n".join(failed)
    return [json.loads(file.read_text()) for file in found]


@pytest.mark.skipif(carrier.ON_GPU and paddle.device.cuda.device_count() < WORKERS, reason="needs two GPUs")
def test_one_sequence_on_two_gpus(record_property, tmp_path):
    """Rows have the bits that one GPU computes, sums over keys are the same but for rounding; every time."""
    for number, record in enumerate(run_workers(tmp_path)):
        assert (record["backend"], record["workers"]) == (BACKEND, WORKERS)
        record_property(f"worker {number}", record)
        for dtype, masks in record["differences"].items():
            for mask, errors in masks.items():
                for name, error in errors.items():
                    assert error <= LARGEST[name], (number, dtype, mask, name, error)
