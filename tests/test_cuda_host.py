"""The host side of the CUDA kernels on a fake runtime (cuda_host/): the choice of kernels, messages, errors of CUDA."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paddle_flashmask import _core

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

TESTS = Path(__file__).resolve().parent
FLASHMASK = TESTS.parent / "custom_ops" / "flashmask"
HOPPER = "{macro}(sm90, 90, 90, FLASHMASK_BFLOAT16, __nv_bfloat16, 64)\n"
PORTABLE = "{macro}(sm80, {range}, FLASHMASK_BFLOAT16, __nv_bfloat16, {dim})\n"
INVALID_VALUE, OUT_OF_MEMORY, NO_IMAGE, LAUNCH_FAILURE = 1, 2, 209, 719  # cudaError_t


class Fake(_core.Library):
    def device(self, capability: int) -> None:
        self._library.fake_device(capability)

    def memory(self, device: int) -> None:
        """Of which device all memory is."""
        self._library.fake_memory(device)

    def fail(self, call: str, error: int) -> None:
        """The next call of this name fails."""
        self._library.fake_failure(call.encode(), error)

    @property
    def last_error(self) -> int:
        """What the thread's next launch would report as its own."""
        return int(self._library.fake_last_error())


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Callable[..., Fake]:
    """Loads a library whose portable kernels are for this range of devices, with or without Hopper's kernels."""
    folder = tmp_path_factory.mktemp("cuda host")
    includes = [f"-I{part}" for part in (folder, FLASHMASK, TESTS / "emulator", TESTS / "emulator" / "toolkit")]
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", *includes]
    command += ["-DFLASHMASK_WITH_CUDA", "-DFLASHMASK_WITH_SM90", "-include", "cuda_runtime.h", "-x", "c++"]

    def compile_(source: Path) -> Path:
        (folder / "built_kernels.inc").touch()
        output = folder / f"{source.stem}.o"
        done = subprocess.run([*command, "-c", source, "-o", output], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    common = [FLASHMASK / "api.cc", FLASHMASK / "cuda" / "cuda_backend.cu", TESTS / "cuda_host" / "fake_runtime.cpp"]
    objects = [compile_(source) for source in common]

    @functools.cache
    def load(capabilities: str, hopper: bool = True, copy: str = "") -> Fake:
        rows = [HOPPER] * hopper + [PORTABLE.replace("{dim}", dim) for dim in ("64", "128")]
        table = "".join(
            row.format(macro=f"FLASHMASK_{direction}", range=capabilities)
            for direction in ("FORWARD", "BACKWARD")
            for row in rows
        )
        (folder / "built_kernels.inc").write_text(table)
        kernels = compile_(FLASHMASK / "cuda" / "kernel_table.cu")
        library = folder / f"lib{capabilities}{hopper}{copy}.so"
        subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", library, *objects, kernels], check=True)
        return Fake(library)

    return load


@pytest.fixture
def library(build) -> Fake:
    library = build("80, 9999")
    library.device(90)
    return library


@pytest.fixture
def params(monkeypatch) -> _core.Params:
    """A call that everything is there for; its arrays live as long as it does."""
    monkeypatch.delenv("FLASHMASK_FORCE_ARCH", raising=False)
    monkeypatch.delenv("FLASHMASK_CUDA_SHARED_LIMIT", raising=False)
    memory = np.zeros(1 << 20, np.uint8)
    address = memory.ctypes.data + -memory.ctypes.data % 256
    made = _core.Params(abi_version=_core.ABI_VERSION, device=_core.CUDA, dtype=_core.BFLOAT16, causal=1, num_bounds=1)
    made.batch = made.heads_q = made.heads_k = made.heads_mask = 1
    made.seqlen_q = made.seqlen_k = 128
    made.head_dim = made.head_dim_v = 64
    made.softmax_scale = 1.0
    made.bounds = made.lse = made.workspace = address
    made.workspace_bytes = 1 << 19
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        setattr(made, name, _core.tensor_view(address, (8192, 64, 64, 1)))
    made.memory = memory
    return made


def test_choice(library, params, monkeypatch):
    assert library.kernel_name(params) == "cuda sm90 d64"
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm80")
    assert library.kernel_name(params, backward=True) == "cuda sm80 d64"
    monkeypatch.delenv("FLASHMASK_FORCE_ARCH")
    params.head_dim = 72
    assert library.kernel_name(params) == "cuda sm80 d128"
    params.head_dim = 64
    for capability in (80, 89, 100, 121):
        library.device(capability)
        assert library.kernel_name(params) == "cuda sm80 d64"


def test_choice_where_only_hoppers_architecture_was_built(build, params, monkeypatch):
    library = build("90, 9999")
    library.device(90)
    assert library.kernel_name(params) == "cuda sm90 d64"
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm80")
    assert library.kernel_name(params) == "cuda sm80 d64"


@pytest.mark.parametrize(
    ("capabilities", "hopper", "capability", "message"),
    [
        ("80, 9999", True, 75, "compute capability 8.0 and newer, the current device has 7.5"),
        ("90, 9999", True, 89, "compute capability 9.0 and newer, the current device has 8.9"),
        ("80, 90", True, 100, "compute capability 8.0 to 9.0, the current device has 10.0"),
        ("90, 90", True, 100, "compute capability 9.0, the current device has 10.0"),
        ("100, 109", False, 120, "compute capability 10.0 to 10.9, the current device has 12.0"),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("forced", ["", "sm80"])
def test_a_device_without_code_is_named(
    build, params, monkeypatch, capabilities, hopper, capability, message, head_dim, forced
):
    library = build(capabilities, hopper)
    library.device(capability)
    params.head_dim = params.head_dim_v = head_dim
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", forced)
    for call in (library.kernel_name, library.forward, library.backward):
        with pytest.raises(NotImplementedError, match=f"^device: .* {re.escape(message)}$"):
            call(params)


def test_other_reasons(library, params, monkeypatch):
    params.dtype = _core.FLOAT32
    with pytest.raises(NotImplementedError, match=r"^dtype: .* got float32"):
        library.forward(params)
    params.dtype = _core.FLOAT16
    with pytest.raises(NotImplementedError, match=r"^dtype: this library was built without float16 CUDA kernels"):
        library.forward(params)
    params.dtype, params.head_dim = _core.BFLOAT16, 136
    with pytest.raises(NotImplementedError, match=r"^head_dim: .* head dims up to those of {64 128} on this device"):
        library.forward(params)
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "sm90")
    with pytest.raises(NotImplementedError, match=r"^FLASHMASK_FORCE_ARCH: .* no kernel of 'sm90'"):
        library.forward(params)


@pytest.mark.parametrize(
    ("call", "backward", "named"),
    [
        ("cudaGetDevice", False, "cudaGetDevice"),
        ("cudaDeviceGetAttribute", False, "compute capability"),
        ("cudaPointerGetAttributes", False, "cudaPointerGetAttributes"),
        ("tile lists", False, "tile list kernel"),
        ("forward", False, "forward kernel"),
        ("cudaMemsetAsync", True, "zeroed counter"),
        ("tile lists", True, "tile list kernel"),
        ("backward", True, "backward kernels"),
    ],
)
@pytest.mark.parametrize(
    ("error", "exception"),
    [
        (INVALID_VALUE, RuntimeError),
        (OUT_OF_MEMORY, MemoryError),
        (NO_IMAGE, NotImplementedError),
        (LAUNCH_FAILURE, RuntimeError),
    ],
)
def test_an_error_is_reported_once(library, params, call, backward, named, error, exception):
    params.deterministic = 1
    run = library.backward if backward else library.forward
    run(params)
    library.fail(call, error)
    with pytest.raises(exception, match=f"^{named}: the planted error"):
        run(params)
    assert library.last_error == 0
    run(params)


def test_memory_of_another_device_is_refused(library, params):
    library.memory(1)
    message = "device: q lies in the memory of GPU 1, but the current device is GPU 0; make GPU 1 the current device"
    for call in (library.forward, library.backward):
        with pytest.raises(ValueError, match=f"^{message} for this call$"):
            call(params)
    library.memory(0)
    library.forward(params)


def test_a_driver_without_tensor_maps_costs_hoppers_kernels_only(build, params):
    library = build("80, 9999", copy="that has not asked the driver yet")
    library.device(90)
    library.fail("cudaGetDriverEntryPoint", INVALID_VALUE)
    library.forward(params)
    assert library.last_error == 0
    assert library.kernel_name(params) == "cuda sm80 d64"
