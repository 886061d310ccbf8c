"""A representative subset of calls for compute-sanitizer: small shapes, every code path, no framework (PyTorch under
the sanitizer takes minutes to start). Values are only looked at for NaN; the other tests say whether they are right.

    compute-sanitizer --tool memcheck python3 tests/gpu/sanitizer_cases.py
    compute-sanitizer --tool racecheck python3 tests/gpu/sanitizer_cases.py

For racecheck of the Hopper kernels, build the library with CUDAFLAGS=-DFLASHMASK_EVERY_LANE_ARRIVES; barrier.cuh says
why.
"""

from __future__ import annotations

import ctypes
import glob
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from device_tensors import load  # noqa: E402
from reference import FORMS, random_intervals  # noqa: E402

from paddle_flashmask import _core  # noqa: E402

PLACES = ("/usr/local/cuda*/lib64/libcudart.so*", "/opt/*/.venv/lib/python3*/site-packages/nvidia/*/lib/libcudart.so*")
RESULTS = ("out", "dq", "dk", "dv")


class Device:
    """Exactly as many bytes as asked for, so that memcheck sees the first byte past the end."""

    def __init__(self) -> None:
        found = [path for place in PLACES for path in sorted(glob.glob(place))]
        self.runtime = ctypes.CDLL(found[0] if found else "libcudart.so")
        self.pointers: list[ctypes.c_void_p] = []

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA error {status}")

    def array(self, values: np.ndarray) -> int:
        pointer = ctypes.c_void_p()
        self.check(self.runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(values.nbytes, 1))))
        self.pointers.append(pointer)
        source = ctypes.c_void_p(values.ctypes.data)
        self.check(self.runtime.cudaMemcpy(pointer, source, ctypes.c_size_t(values.nbytes), 1))
        return int(pointer.value or 0)

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        result = np.empty_like(like)
        target, source = ctypes.c_void_p(result.ctypes.data), ctypes.c_void_p(address)
        self.check(self.runtime.cudaMemcpy(target, source, ctypes.c_size_t(like.nbytes), 2))
        return result

    def free(self) -> None:
        for pointer in self.pointers:
            self.check(self.runtime.cudaFree(pointer))
        self.pointers.clear()


def case(device: Device, library: _core.Library, rng: np.random.Generator, number: int, d: int, **fields: Any) -> None:
    n, causal = ((0, False), (0, True), *FORMS, (0, False))[number]
    s_q, s_k = ((131, 200), (257, 257), (200, 150))[number % 3]
    h_q, h_k = 2, 1

    def tensor(name: str, s: int, h: int) -> tuple[np.ndarray, _core.TensorView]:
        drawn = rng.standard_normal((1, s, h, d), dtype=np.float32)
        if name == "k" and number in (1, 5, 6):  # scores outgrow the exponentials of the first tile's largest
            drawn *= np.linspace(1, 150, s, dtype=np.float32)[:, None, None]
        values = _core.to_bf16(drawn)
        if name in RESULTS:
            values[:] = 0x7FC0  # NaN: what stays unwritten shows
        return values, _core.tensor_view(device.array(values), (s * h * d, h * d, d, 1))

    views = {name: tensor(name, s_q, h_q) for name in ("q", "out", "dout", "dq")}
    views |= {name: tensor(name, s_k, h_k) for name in ("k", "v", "dk", "dv")}
    bounds = random_intervals(rng, 1, h_q, s_q, s_k, n) if n else None
    blocks = (rng.random((1, h_q, -(-s_q // 128), -(-s_k // 128))) < 0.7).astype(np.int32)
    params = _core.Params(
        abi_version=_core.ABI_VERSION,
        device=_core.CUDA,
        dtype=_core.BFLOAT16,
        batch=1,
        heads_q=h_q,
        heads_k=h_k,
        heads_mask=h_q,
        seqlen_q=s_q,
        seqlen_k=s_k,
        head_dim=d,
        head_dim_v=d,
        causal=causal,
        num_bounds=n,
        deterministic=number % 2 == 0,
        softmax_scale=d**-0.5,
        dropout=0.3 if number in (0, 3) else 0.0,
        lse=device.array(np.zeros(h_q * s_q, np.float32)),
        bounds=None if bounds is None else device.array(bounds),
        block_mask=device.array(blocks) if number in (1, 4) else None,
        seed_offset=device.array(np.array([1, 2], np.int64)),
        **{name: view for name, (_, view) in views.items()},
    )
    for size, call in (
        (library.forward_workspace_bytes(params), library.forward),
        (library.backward_workspace_bytes(params), library.backward),
    ):
        params.workspace = device.array(np.full(size, 255, np.uint8)) if size else None
        params.workspace_bytes = size
        call(params)
    device.check(device.runtime.cudaDeviceSynchronize())
    for name in RESULTS:
        values, view = views[name]
        if np.isnan(_core.from_bf16(device.read(view.data, values))).any():
            raise RuntimeError(f"{name}: NaN")
    device.free()


def main(dims: list[int]) -> None:
    rng = np.random.default_rng(0)
    device, library = Device(), load()
    for d in dims:
        for number in range(7):
            case(device, library, rng, number, d)
            print(f"d = {d}, case {number}: ran", flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [32, 64, 72, 128, 192, 256])
