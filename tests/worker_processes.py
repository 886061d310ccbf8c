"""Workers of paddle.distributed as processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(
    commands: Sequence[Sequence[Any]], folder: Path, environment: dict[str, str], seconds: float, **options: Any
) -> list[str]:
    """What each worker wrote; fails where one fails, with what that one wrote last.

    Args:
        commands: the arguments of Python for each worker.
        folder: where their output goes.
        environment: variables beside those by which workers find each other.
        seconds: how long they may take.
        options: of `subprocess.Popen`.
    """
    master, *ports = free_ports(len(commands) + 1)
    ends = [f"127.0.0.1:{port}" for port in ports]
    processes, logs = [], [folder / f"worker-{rank}.txt" for rank in range(len(commands))]
    for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
        variables = {
            **os.environ,
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(len(commands)),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
            "PADDLE_CURRENT_ENDPOINT": ends[rank],
            "PADDLE_MASTER": f"127.0.0.1:{master}",
            "FLAGS_selected_gpus": str(rank),
            **environment,
        }
        with log.open("w") as output:
            started = subprocess.Popen(
                [sys.executable, *command], env=variables, stdout=output, stderr=output, **options
            )
            processes.append(started)
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):  # the others may wait for it for ever
            end = min(end, time.monotonic() + 5)
        time.sleep(0.1)
    statuses = [process.poll() for process in processes]  # None: it was still at work
    for process in processes:
        process.kill()
        process.wait()
    texts = [log.read_text() for log in logs]
    failed = [f"worker {r}, status {s}:\n{texts[r][-3000:]}" for r, s in enumerate(statuses) if s != 0]
    assert not failed, "\n".join(failed)
    return texts
